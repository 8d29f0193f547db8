"""The policy that is trained: log-probs of given sequences, optimizer steps, weights out.

    policy = Policy(arch, checkpoint_dir, config, layout)
    old = policy.logprobs(batch.sequences)
    update = policy.update(replace(batch, old_logp=old.logp))
    for name, tensor in policy.export(): ...

Every method is a collective: all ranks call it with the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from etr_megatron import platform
from etr_megatron.config import Config
from etr_megatron.objective import LossOutputs, diagnostic_sums, resolve_loss
from etr_megatron.policy.batch import PolicyBatch
from etr_megatron.policy.loss_inputs import loss_inputs, loss_settings, pass_rate_bins_of_rows, refuse_not_finite
from etr_megatron.policy.megatron_weights import load_weights
from etr_megatron.policy.model import PolicyModel, build_model, export_hf_weights, forget_routing
from etr_megatron.policy.model_config import transformer_config
from etr_megatron.policy.packing import Microbatch, pack, plan_microbatches
from etr_megatron.policy.parallel import Layout
from etr_megatron.vocab_parallel import vocab_parallel_logprob, vocab_parallel_loss
from etr_megatron.weights import Architecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TokenLogprobs:
    """Per sample, fp32 CPU [response tokens]: log-prob of each response token and entropy of its distribution."""

    logp: tuple[Tensor, ...]
    entropy: tuple[Tensor, ...]


@dataclass(frozen=True)
class Update:
    """One optimizer step. loss: of the whole batch. sums: see `objective.diagnostic_sums`. grad_norm: before clipping. lr: of
    this step."""

    loss: float
    sums: dict[str, float]
    grad_norm: float
    lr: float


class Policy:
    """A Megatron model in its layout with its optimizer, and a frozen reference model when the objective has a KL term.

    config must be resolved (no `auto`). Raises UserError for a checkpoint that cannot be read.
    """

    def __init__(self, arch: Architecture, checkpoint_dir: str | Path, config: Config, layout: Layout) -> None:
        self.arch, self.config, self.layout = arch, config, layout
        self._megatron = transformer_config(
            arch,
            layout,
            sequence_parallel=config.parallel.sequence_parallel,
            dtype=DTYPES[config.model.dtype],
            recompute=config.train.recompute,
        )
        self.model = build_model(arch, self._megatron, layout)
        load_weights(self.model, checkpoint_dir)
        self.reference: PolicyModel | None = None
        if config.objective.kl_coef > 0:
            self.reference = build_model(arch, self._megatron, layout).requires_grad_(False)
            load_weights(self.reference, checkpoint_dir)
        self._ddp = DistributedDataParallel(
            self._megatron,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=config.train.distributed_optimizer,
                overlap_grad_reduce=config.train.overlap_grad_reduce,
                check_for_nan_in_grad=True,
            ),
            self.model,
        )
        self.optimizer = get_megatron_optimizer(_optimizer_config(config), [self._ddp])
        self.scheduler = _scheduler(self.optimizer, config)
        self._megatron.finalize_model_grads_func = _finalize_without_division
        self._megatron.grad_scale_func = self.optimizer.scale_loss
        if config.train.overlap_grad_reduce:
            # Megatron's schedule turns the reduction off for all but the last microbatch.
            self._megatron.no_sync_func = self._ddp.no_sync
        self._policy_loss = resolve_loss(config.objective.loss)

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, reference: bool = False) -> TokenLogprobs:
        """Tempered log-probs and entropies of the response tokens under the current (or the reference) weights, on every rank.

        sequences: (prompt ids, response ids) of each sample.
        """
        model = self.reference if reference else self._ddp
        if model is None:
            raise RuntimeError("no reference model: objective.kl_coef is 0")
        micro = self._microbatches(sequences)

        def collect(batch: Microbatch, hidden: Tensor, non_loss_data: bool = True) -> tuple[Microbatch, Tensor]:
            tensors, options = self._head_inputs(model, hidden, batch)
            return batch, torch.stack(vocab_parallel_logprob(*tensors, **options))

        with torch.no_grad():
            found = self._run(model, micro, collect, forward_only=True)
        sizes = [len(response) for _, response in sequences]
        starts = torch.tensor([0, *sizes]).cumsum(0)
        everything = torch.zeros(2, int(starts[-1]), dtype=torch.float32, device=platform.device())
        if self.layout.is_reporter:
            for batch, values in found:
                places = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in batch.samples] or [torch.zeros(0)])
                everything[:, places.long()] = values
        # Every sample has one reporter: adding zeros spreads the results and changes no bit of them.
        dist.all_reduce(everything)
        logp, entropy = everything.cpu()
        return TokenLogprobs(logp.split(sizes), entropy.split(sizes))

    def update(self, batch: PolicyBatch) -> Update:
        """One optimizer step on the whole batch. `old_logp` must be there, and `ref_logp` when there is a KL term.

        Raises FloatingPointError for a log-prob that is not finite (see `refuse_not_finite`), RuntimeError for such gradients.
        """
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = self.optimizer.param_groups[0]["lr"]
        micro = self._microbatches(batch.sequences)
        # Read once: every reading waits for the device.
        scale = self.optimizer.get_loss_scale().item()
        outputs = self._run(self._ddp, micro, partial(self._loss, batch, scale), forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        totals: dict[str, float] = {}
        shares: list[Any] = [None] * self.layout.world
        dist.all_gather_object(shares, outputs if self.layout.is_reporter else [])
        for sums in (sums for share in shares for sums in share):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        return Update(totals.pop("loss"), totals, float(grad_norm), lr)

    def load_schedule(self, state: dict[str, Any]) -> None:
        """Continue the learning-rate schedule where `scheduler.state_dict()` was taken, on the config of now.

        Only the count of updates comes from the checkpoint; the shape follows `run.steps` and `train` as they are now.
        """
        for group in self.optimizer.param_groups:  # the optimizer's state brought the old run's limits along
            group["max_lr"], group["min_lr"] = self.config.train.lr, self.config.train.min_lr
        self.scheduler.load_state_dict(state)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Full HF tensors by name, see `export_hf_weights`."""
        return export_hf_weights(self.model)

    def _microbatches(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Microbatch]:
        """This rank's microbatches; the count is the same on every rank."""
        plan = plan_microbatches(
            [len(prompt) + len(response) for prompt, response in sequences],
            dp=self.layout.dp,
            token_budget=self.config.train.tokens_per_microbatch,
        )
        multiple = self.layout.tp if self.config.parallel.sequence_parallel else 1
        return [pack(sequences, numbers, multiple=multiple, device=platform.device()) for numbers in plan[self.layout.dp_rank]]

    def _run(self, model: Any, micro: Sequence[Microbatch], then: Any, *, forward_only: bool) -> list[Any]:
        """Megatron's schedule over the microbatches; `then(microbatch, hidden)` runs on the last stage."""

        def forward(iterator: Iterator[Microbatch], stage: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=batch.offsets,
                cu_seqlens_kv=batch.offsets,
                max_seqlen_q=batch.longest,
                max_seqlen_kv=batch.longest,
            )
            hidden = stage(batch.tokens, batch.positions, None, packed_seq_params=packed)
            return hidden, partial(then, batch)

        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro),
            model=[model],
            num_microbatches=len(micro),
            seq_length=max(batch.tokens.shape[1] for batch in micro),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        forget_routing(model)
        return found

    def _head_inputs(self, model: Any, hidden: Tensor, batch: Microbatch) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """(hidden states of the loss rows [R, H], head weight, targets [R]) and the options of the head, from the last stage's
        hidden states [T (/ TP), 1, H]."""
        stage: PolicyModel = getattr(model, "module", model)
        split = self.config.parallel.sequence_parallel
        if split:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        options = {
            "shard": stage.vocab_shard,
            "temperature": self.config.rollout.temperature,
            "chunk_rows": self.config.train.head_chunk_rows,
            # The gather's backward reduce-scatters, so the partial sums must reach it unreduced.
            "reduce_hidden_grad": not split,
        }
        return (hidden[:, 0].index_select(0, batch.rows), stage.head_weight(), batch.targets), options

    def _loss(
        self, batch: PolicyBatch, scale: float, micro: Microbatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Loss of a microbatch, already divided by the denominator of the batch; Megatron ignores the token count.

        scale: the optimizer's loss scale, with which Megatron goes backward. A token-local loss is evaluated chunk by chunk
        inside the head; one of whole sequences needs all rows first.
        """
        known = loss_inputs(batch, micro, loss_settings(self.config.objective))
        tensors, options = self._head_inputs(self._ddp, hidden, micro)
        parts: list[LossOutputs] = []

        def rows_loss(rows: slice, logp: Tensor, entropy: Tensor) -> Tensor:
            parts.append(self._policy_loss(known.at(rows, logp, entropy)))
            return parts[-1].loss

        if self._policy_loss.token_local:
            loss, logp, entropy = vocab_parallel_loss(*tensors, rows_loss, backward_scale=scale, **options)
        else:
            logp, entropy = vocab_parallel_logprob(*tensors, **options)
            loss = rows_loss(slice(None), logp, entropy)
        inputs = known.at(slice(None), logp.detach(), entropy.detach())
        refuse_not_finite(inputs, batch, micro, self.layout.rank)
        own = {name: torch.cat([part.rows[name] for part in parts]) for name in (parts[0].rows if parts else ())}
        result = LossOutputs(loss.detach(), own)
        sums = {"loss": loss.item(), **diagnostic_sums(inputs, result, pass_rate_bins_of_rows(batch, micro))}
        return loss, torch.tensor(len(micro.targets), dtype=torch.int, device=logp.device), sums


def _finalize_without_division(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Megatron's gradient reductions, without its division by the token count: the loss carries our denominator already."""
    finalize_model_grads(model, None, **options)


def _optimizer_config(config: Config) -> OptimizerConfig:
    train = config.train
    return OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        # An infinite limit keeps the norm measured and never scales; 0 would not even measure it.
        clip_grad=train.clip_grad or float("inf"),
        bf16=config.model.dtype == "bfloat16",
        params_dtype=DTYPES[config.model.dtype],
        use_distributed_optimizer=train.distributed_optimizer,
    )


def _scheduler(optimizer: Any, config: Config) -> OptimizerParamScheduler:
    train = config.train
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.lr_warmup_updates,
        lr_decay_steps=config.run.steps * train.epochs * train.minibatches,
        lr_decay_style=train.lr_decay,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
