"""The trained policy: log-probs of given sequences, optimizer steps, weight export.

    policy = Policy(arch, checkpoint_dir, config, layout)
    old = policy.logprobs(batch.sequences)
    update = policy.update(replace(batch, old_logp=old.logp))
    for name, tensor in policy.export(): ...

Every method is a collective: all ranks call it with the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from etr_megatron import platform
from etr_megatron.config import LOSSES, Config, resolved
from etr_megatron.flops import sequence_flops
from etr_megatron.objective import LossInputs, check_row_independence, resolve_loss
from etr_megatron.policy.adapters import PolicyAdapters
from etr_megatron.policy.balance import ExpertBalance
from etr_megatron.policy.batch import PolicyBatch
from etr_megatron.policy.context import padded_length
from etr_megatron.policy.export import Export
from etr_megatron.policy.fp8 import drop_weight_copies, require_fp8, token_multiple
from etr_megatron.policy.megatron_fields import complaints_about
from etr_megatron.policy.megatron_weights import load_weights
from etr_megatron.policy.microbatch_plan import plan_microbatches
from etr_megatron.policy.model import PolicyModel, build_chunks
from etr_megatron.policy.model_config import configured_transformer
from etr_megatron.policy.non_finite import check_gradients_finite
from etr_megatron.policy.optimizer import build_optimizer, lr_scheduler, wrap_chunks
from etr_megatron.policy.packing import Microbatch, pack, refuse_unknown_tokens
from etr_megatron.policy.parallel import Layout
from etr_megatron.policy.routing import RoutingReplay, StepRouting, routers
from etr_megatron.policy.schedule import run_schedule
from etr_megatron.policy.step_loss import StepLoss
from etr_megatron.types import AnySequence, TokenSequence
from etr_megatron.vocab_parallel import vocab_parallel_logprob
from etr_megatron.weights import Architecture


@dataclass(frozen=True)
class TokenLogprobs:
    """Per sample, fp32 CPU [response tokens that the model generated]: log-prob of each and entropy of its distribution."""

    logp: tuple[Tensor, ...]
    entropy: tuple[Tensor, ...]


@dataclass(frozen=True)
class Update:
    """Result of one optimizer step. loss: the whole batch's. sums: see `objective.diagnostic_sums`. grad_norm: gradient norm
    before clipping. lr: learning rate of this step. balance: expert load balance, see `ExpertBalance.take`. memory:
    `platform.take_memory_peaks` since the last update, the highest of all ranks."""

    loss: float
    sums: dict[str, float]
    grad_norm: float
    lr: float
    balance: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


class Policy:
    """A Megatron model in its layout with its optimizer, and a frozen reference model if the objective has a KL term.

    chunks: this rank's `layout.vpp` model chunks. adapters: with `lora.rank`, the low-rank adapters, which are trained instead
    of the chunks' weights; the reference is then the model without adapters. config must be resolved (no `auto`). Raises
    UserError for a checkpoint that cannot be read, for FP8 where Megatron would silently train without it, and for fields in
    `train.megatron` that Megatron refuses.
    """

    def __init__(self, arch: Architecture, checkpoint_dir: str | Path, config: Config, layout: Layout) -> None:
        self.arch, self.config, self.layout = arch, config, layout
        require_fp8(config.fp8)
        self._megatron = configured_transformer(arch, layout, config)
        if config.lora.rank:
            # The fused kernel adds to `main_grad`, which adapted weights do not have.
            self._megatron.gradient_accumulation_fusion = False
        with complaints_about(config.train.megatron):
            self.chunks = build_chunks(arch, self._megatron, layout)
        self.reference: list[PolicyModel] | None = None
        self.has_reference = config.objective.kl_coef > 0
        if self.has_reference and not config.lora.rank:
            self.reference = [chunk.requires_grad_(False) for chunk in build_chunks(arch, self._megatron, layout)]
        load_weights([chunks for chunks in (self.chunks, self.reference) if chunks is not None], checkpoint_dir)
        self.adapters = PolicyAdapters(arch, self.chunks, layout, config)
        self._balance: ExpertBalance | None = None
        self._routing: RoutingReplay | None = None
        if arch.experts is not None:
            self._balance = ExpertBalance(arch, self.chunks, layout, tp_shares=config.parallel.sequence_parallel)
            self._routing = RoutingReplay(arch, self.chunks, layout, tp_shares=config.parallel.sequence_parallel)
        if config.train.moe_freeze_router:
            for router in routers(self.chunks):
                router.requires_grad_(False)
        self._ddp = wrap_chunks(self.chunks, self._megatron, config)
        self.optimizer = build_optimizer(self._ddp, config)
        self.scheduler = lr_scheduler(self.optimizer, config)
        self.adapters.watch()
        self._megatron.grad_scale_func = self.optimizer.scale_loss
        if config.train.overlap_grad_reduce:
            # Megatron's schedules use it to disable the reduction for all but the last microbatch.
            no_sync = [chunk.no_sync for chunk in self._ddp]
            func: Any = no_sync if len(no_sync) > 1 else no_sync[0]  # Megatron takes a list, too
            self._megatron.no_sync_func = func
        self._policy_loss = resolve_loss(resolved(config.objective.loss))
        self._unchecked = self._policy_loss.token_local and config.objective.loss not in LOSSES

    def logprobs(
        self,
        sequences: Sequence[AnySequence],
        *,
        reference: bool = False,
        routing: StepRouting | None = None,
    ) -> TokenLogprobs:
        """Tempered log-probs and entropies of the generated response tokens, under the current (or the reference) weights, on
        every rank.

        sequences: one per sample. routing: see `PolicyBatch`; the reference chooses its own experts.
        Raises UserError for a token outside the vocabulary, RuntimeError if there is no reference.
        """
        if reference and not self.has_reference:
            raise RuntimeError("no reference model: objective.kl_coef is 0")
        chunks = self.reference if reference and self.reference is not None else self._ddp
        whole = [TokenSequence(*one) for one in sequences]
        micro = self._microbatches(whole)

        def collect(number: int, hidden: Tensor, non_loss_data: bool = True) -> tuple[Microbatch, Tensor]:
            tensors, options = self._head_inputs(chunks[-1], hidden, micro[number])
            return micro[number], torch.stack(vocab_parallel_logprob(*tensors, **options))

        weights = self.adapters.disabled() if reference and self.adapters else nullcontext()
        with torch.no_grad(), weights, self._replaying(micro, routing):
            found = run_schedule(chunks, micro, collect, forward_only=True)
        sizes = [one.rows for one in whole]
        starts = torch.tensor([0, *sizes]).cumsum(0)
        everything = torch.zeros(2, int(starts[-1]), dtype=torch.float32, device=platform.device())
        if self.layout.is_reporter:
            for batch, values in found:
                at = starts[batch.row_sample] + batch.row_position
                everything[:, at.to(everything.device)] = values
        # Every token has exactly one reporter, so the sum broadcasts the results bit for bit.
        dist.all_reduce(everything)
        logp, entropy = everything.cpu()
        return TokenLogprobs(logp.split(sizes), entropy.split(sizes))

    def update(self, batch: PolicyBatch) -> Update:
        """Run one optimizer step on the whole batch. Needs `old_logp`, and `ref_logp` if there is a KL term.

        Raises FloatingPointError for a non-finite log-prob, loss or gradient of the loss (see `non_finite`), RuntimeError for
        non-finite parameter gradients, UserError for a custom loss that fails or returns something invalid, and for a token
        outside the vocabulary.
        """
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        lr = self.optimizer.param_groups[0]["lr"]
        micro = self._microbatches(batch.sequences)
        if self.config.train.moe_aux_loss_coef:
            self._megatron.moe_aux_loss_coeff = self._aux_loss_weight(micro)
        # Read once: every read synchronizes with the device.
        scale = self.optimizer.get_loss_scale().item()
        loss = StepLoss(
            self._policy_loss,
            batch,
            micro,
            self.config.objective,
            self.layout,
            scale=scale,
            head_inputs=partial(self._head_inputs, self._ddp[-1]),
            try_rows=self._check_additivity,
        )
        self._megatron.finalize_model_grads_func = partial(self._finalize_gradients, loss)
        with self._replaying(micro, batch.routing):
            outputs = run_schedule(self._ddp, micro, loss, forward_only=False)
        self._megatron.finalize_model_grads_func = None  # holds the step's inputs
        _, grad_norm, _ = self.optimizer.step()
        self.adapters.merge()
        self.optimizer.zero_grad()  # else the fp32 copies of bfloat16 gradients stay while servers need the memory
        self.scheduler.step(1)
        shares: list[Any] = [None] * self.layout.world
        mine = loss.read(outputs) if self.layout.is_reporter else {}
        dist.all_gather_object(shares, (self._policy_loss.row_names, mine, platform.take_memory_peaks()))
        names, sums, peaks = zip(*shares, strict=True)
        self._policy_loss.refuse_other_names(names)
        totals = _totals(sums)
        balance = {} if self._balance is None else self._balance.take()
        memory = {name: max(peak[name] for peak in peaks) for name in peaks[0]}
        return Update(totals.pop("loss"), totals, float(grad_norm), lr, balance, memory)

    def load_schedule(self, state: dict[str, Any]) -> None:
        """Continue the learning-rate schedule from a `scheduler.state_dict()` under the current config.

        Only the count of updates comes from the checkpoint; the shape follows the current `run.steps` and `train`.
        """
        for group in self.optimizer.param_groups:  # the optimizer's state restored the old run's limits
            group["max_lr"], group["min_lr"] = self.config.train.lr, self.config.train.min_lr
        self.scheduler.load_state_dict(state)

    def export(self) -> Export:
        """The current weights; iterating yields full HF tensors by name."""
        self.finish_update()
        return Export(self)

    def offload(self) -> None:
        """With `train.offload_for_rollout`, free the GPU memory that only training needs, until `reload`: gradients and FP8
        copies of weights are dropped, and the optimizer's state moves to the CPU. Weights stay. May be called again."""
        if not self.config.train.offload_for_rollout:
            return
        for chunk in self._ddp:
            chunk.offload_grad_buffers(empty_cache=False)
        drop_weight_copies([*self.chunks, *(self.reference or [])])
        if not self.config.train.optimizer_offload:  # else it is there already
            self.optimizer.offload_to_cpu()

    def reload(self) -> None:
        """Undo `offload`; needed before an update."""
        if not self.config.train.offload_for_rollout:
            return
        for chunk in self._ddp:
            chunk.restore_grad_buffers()
        if not self.config.train.optimizer_offload:
            self.optimizer.restore_from_cpu()

    def finish_update(self) -> None:
        """Run the parameter all-gather that an update deferred to the next forward pass; needed before reading parameters. A
        collective."""
        if self.config.train.overlap_param_gather:
            for chunk in self._ddp:
                for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                    # Megatron does the same before a forward pass. `start_param_sync(force_sync=True)` would not update the
                    # transposed copies of FP8 weights, which backward passes use.
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def _finalize_gradients(self, loss: StepLoss, model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
        """Megatron's gradient reductions without the division by the token count: the loss already has our denominator. Called
        on every rank after its last pass."""
        loss.check_finite()
        self.adapters.sum_gradients(model)
        finalize_model_grads(model, None, **options)
        check_gradients_finite(self._ddp)

    def _microbatches(self, sequences: Sequence[TokenSequence]) -> list[Microbatch]:
        """This rank's microbatches, equally many on every rank. Raises UserError for a token outside the vocabulary."""
        layout, config = self.layout, self.config
        refuse_unknown_tokens(sequences, self.arch.vocab_size)
        lengths = [len(one.prompt) + len(one.response) for one in sequences]
        plan = plan_microbatches(
            [padded_length(length, layout.cp) for length in lengths],
            costs=[int(sequence_flops(self.arch, n, one.rows)) for n, one in zip(lengths, sequences, strict=True)],
            dp=layout.dp,
            token_budget=config.train.tokens_per_microbatch,
            # The interleaved schedule runs microbatches in rounds of one per stage.
            multiple=layout.pp if layout.vpp > 1 else 1,
        )
        multiple = token_multiple(config.fp8, layout.tp, sequence_parallel=config.parallel.sequence_parallel)
        packed = partial(pack, sequences, multiple=multiple, device=platform.device(), cp=layout.cp, cp_rank=layout.cp_rank)
        return [packed(numbers) for numbers in plan[layout.dp_rank]]

    def _replaying(self, micro: Sequence[Microbatch], routing: StepRouting | None) -> AbstractContextManager[None]:
        """Context in which passes over these microbatches use the experts of `routing`, if given."""
        return nullcontext() if self._routing is None else self._routing.replaying(micro, routing)

    def _aux_loss_weight(self, micro: Sequence[Microbatch]) -> float:
        """The coefficient that makes Megatron's load-balancing loss a mean over the tokens of the optimizer step.

        With `calculate_per_token_loss` Megatron weights a microbatch's loss by this rank's tokens in it (each rank of a replica
        has a share) and expects a later division by all tokens, which we skip.
        """
        layout, sequence_parallel = self.layout, self.config.parallel.sequence_parallel
        tokens = torch.tensor(float(sum(batch.tokens.shape[1] for batch in micro)), device=platform.device())
        dist.all_reduce(tokens, group=mpu.get_data_parallel_group(with_context_parallel=True))
        shares = layout.cp * (layout.tp if sequence_parallel else 1)
        return self.config.train.moe_aux_loss_coef * shares / tokens.item()

    def _head_inputs(
        self, model: Any, hidden: Tensor, batch: Microbatch
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """(hidden states of the loss rows [R, H], head weight, targets [R]) and the head's options, from the last stage's
        hidden states [T (/ TP), 1, H]."""
        stage: PolicyModel = getattr(model, "module", model)
        weight = stage.head_weight()
        if self.config.train.overlap_param_gather and model is not stage:
            # The head has no forward pass that would wait for its all-gather.
            model.param_to_bucket_group[weight].finish_param_sync()
        if self.config.parallel.sequence_parallel:
            # The head sums the gradient over the shards itself, in fp32, so backward only takes this rank's slice of it.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        options = {
            "shard": stage.vocab_shard,
            "temperature": self.config.rollout.temperature,
            "chunk_rows": self.config.train.head_chunk_rows,
        }
        return (hidden[:, 0].index_select(0, batch.rows), weight, batch.targets), options

    def _check_additivity(self, inputs: LossInputs) -> None:
        """Check once that a custom loss is additive over rows, as chunking in the head requires; needs at least two rows."""
        if self._unchecked and len(inputs.logp) > 1:
            self._unchecked = not check_row_independence(self._policy_loss, inputs)


def _totals(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    """The sum of each name's values."""
    totals: dict[str, float] = {}
    for sums in shares:
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals
