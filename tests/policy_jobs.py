"""Jobs that gang ranks run for the tests of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from etr_megatron.config import load_config, resolve
from etr_megatron.errors import UserError
from etr_megatron.policy import Policy, PolicyBatch, configured_layout
from etr_megatron.types import TokenSequence
from etr_megatron.weights import TABLES, read_architecture
from etr_megatron.weights.map import Row


def build(model: str, overrides: list[str], **train: Any) -> Policy:
    """train: settings of that section that the rules would refuse on CPU; set after the config has been validated."""
    config = resolve(load_config(None, [f"model.path={model}", *overrides]), dist.get_world_size(), cuda=False)
    config = replace(config, train=replace(config.train, **train))
    return Policy(read_architecture(model), model, config, configured_layout(config))


def logprobs(model: str, sequences: list, overrides: list[str]) -> tuple[list, list]:
    """Log-probs and entropies per sample, as lists."""
    found = build(model, overrides).logprobs(sequences)
    return [x.tolist() for x in found.logp], [x.tolist() for x in found.entropy]


def make_batch(sequences: list, seed: int = 5) -> PolicyBatch:
    """Advantages, bounds and old log-probs such that both bounds are active for some tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = len(sequences)
    sizes = [TokenSequence(*one).rows for one in sequences]

    def rows() -> tuple[torch.Tensor, ...]:
        return tuple(-4.0 + 2 * torch.randn(size, generator=generator) for size in sizes)

    return PolicyBatch(
        names=tuple(f"g{i // 2}/{i % 2}" for i in range(count)),
        sequences=tuple(sequences),
        advantage=torch.randn(count, generator=generator),
        clip_low=0.1 + 0.2 * torch.rand(count, generator=generator),
        clip_high=0.1 + 0.2 * torch.rand(count, generator=generator),
        weight=torch.full((count,), 1 / sum(sizes)),
        group_mean=torch.rand(count, generator=generator),
        group_std=torch.rand(count, generator=generator),
        variance=torch.rand(count, generator=generator),
        pass_rate_bin=torch.arange(count) % 5 - 1,
        rollout_logp=rows(),
        old_logp=rows(),
    )


def with_replies(sequences: list) -> list[TokenSequence]:
    """The same tokens, in turns of the model and replies. The first response is a reply alone, and the second begins with one,
    as no real one does; the third and the last are all drawn."""
    generator = torch.Generator().manual_seed(8)
    found = []
    for number, (prompt, response) in enumerate(sequences):
        mask: list[int] = []
        is_drawn = number != 1
        while len(mask) < len(response):
            mask += [int(is_drawn)] * int(torch.randint(1, 7, (1,), generator=generator))
            is_drawn = not is_drawn
        mask = [0] * len(response) if number == 0 else mask[: len(response)]
        found.append(TokenSequence(prompt, response, () if number in (2, len(sequences) - 1) else mask))
    return found


def train(model: str, sequences: list, overrides: list[str], updates: int = 2) -> dict[str, Any]:
    """Loss, gradient norm and metric sums of some updates on one batch, then all weights by HF name."""
    policy = build(model, overrides)
    batch = make_batch(sequences)
    old = policy.logprobs(batch.sequences)
    # Old log-probs near the policy's own, so that ratios straddle the bounds.
    noise = [0.3 * (x - x.mean()) for x in batch.old_logp]
    batch = replace(batch, old_logp=tuple(a + torch.nan_to_num(b) for a, b in zip(old.logp, noise, strict=True)))
    if policy.has_reference:
        batch = replace(batch, ref_logp=policy.logprobs(batch.sequences, reference=True).logp)
    steps = [policy.update(batch) for _ in range(updates)]
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "sums": [step.sums for step in steps],
        "weights": {name: tensor.clone() for name, tensor in policy.export()},
    }


def train_marked(model: str, sequences: list, overrides: list[str]) -> dict[str, Any]:
    """`train` with the mark that Transformer Engine gives to all of its matrices, that ranks have parts of them, on those of
    latent attention that ranks have whole."""
    from megatron.core.post_training.modelopt.layers import Linear  # only after etr_megatron.policy has prepared it

    original = Linear.__init__

    def init(self: Linear, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.weight.tensor_model_parallel = True

    with mock.patch.object(Linear, "__init__", init):
        return train(model, sequences, overrides)


def export(model: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    """All weights by HF name."""
    return {name: tensor.clone() for name, tensor in build(model, overrides).export()}


def padded_logits(model: str, tokens: torch.Tensor, overrides: list[str]) -> torch.Tensor | None:
    """Logits [B, S, V] of a batch [B, S] padded on the right, through the pipeline; None except on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func  # only after etr_megatron.policy has prepared it
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    policy = build(model, overrides)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)

    def forward(iterator, stage):
        return stage(next(iterator), positions, None), lambda hidden, non_loss_data: hidden

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([tokens]),
            model=policy.chunks,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not policy.layout.is_last_stage:
            return None
        hidden = found[0]
        if policy.config.parallel.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        logits = gather_from_tensor_model_parallel_region(hidden @ policy.chunks[-1].head_weight().t())
    return logits.transpose(0, 1)[..., : policy.arch.vocab_size]


def memory_peaks(model: str, sequences: list) -> dict[str, float]:
    """`Update.memory` of an update for which each rank's device counts peaks of its own."""
    policy = build(model, [])
    rank = dist.get_rank()
    counted = {"memory_allocated_gib": 5.0 - rank, "memory_reserved_gib": 7.0 + rank}
    with mock.patch("etr_megatron.platform.take_memory_peaks", lambda: counted):
        return policy.update(make_batch(sequences)).memory


def nan_error(model: str, sequences: list, overrides: Sequence[str] = (), *, in_weights: bool) -> str:
    """The error of an update. in_weights: after a NaN in the embedding of a token of the last sample only."""
    policy = build(model, ["parallel.tp=1", *overrides])
    batch = make_batch(sequences)
    if in_weights:
        with torch.no_grad():
            policy.chunks[0].embedding.word_embeddings.weight[sequences[-1][0][0]] = float("nan")
    try:
        policy.update(batch)
    except (FloatingPointError, UserError) as error:
        return str(error)
    return ""


def start_of_weights_held_in_fp8(model: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The optimizer's fp32 weights and the loaded ones [n] of layers' matrices that pass for FP8 weights of Transformer Engine:
    these keep the random values that they were made with, behind two methods."""
    from etr_megatron.policy import policy as policy_module

    def initial(parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return getattr(parameter, "_high_precision_init_val", None)

    def clear(parameter: torch.nn.Parameter) -> None:
        vars(parameter).pop("_high_precision_init_val", None)

    def build_chunks(*args: Any) -> list[Any]:
        chunks = original(*args)
        for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
            if "linear" in name and parameter.dim() == 2:
                parameter._high_precision_init_val = torch.zeros_like(parameter)
                parameter.get_high_precision_init_val = MethodType(initial, parameter)
                parameter.clear_high_precision_init_val = MethodType(clear, parameter)
                held[name] = parameter
        return chunks

    held: dict[str, torch.nn.Parameter] = {}
    original = policy_module.build_chunks
    with (
        mock.patch.object(policy_module, "build_chunks", build_chunks),
        mock.patch(
            "megatron.core.optimizer.distrib_optimizer.is_float8tensor",
            lambda tensor: any(tensor is parameter for parameter in held.values()),
        ),
    ):
        build(model, ["parallel.tp=1", "model.dtype=bfloat16", "train.distributed_optimizer=true"])
    return {name: (parameter.main_param, parameter.detach().float().view(-1)) for name, parameter in held.items()}


def not_processed_after_gathering(model: str) -> list[str]:
    """Weights that Megatron has not let Transformer Engine process, after an update and an export have gathered them."""
    place = "megatron.core.distributed.param_and_grad_buffer"
    overlap = [f"train.{name}=true" for name in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")]
    policy = build(model, ["parallel.tp=1", *overlap])
    policy.update(make_batch([([7, 8, 9], [1, 2]), ([5], [3] * 4)]))
    processed: list[torch.Tensor] = []
    with (
        mock.patch(f"{place}.is_float8tensor", lambda tensor: True),
        mock.patch(f"{place}.post_all_gather_processing", processed.extend),
    ):
        policy.export()
        policy.logprobs([([7, 8, 9], [1, 2])])
    names = {parameter: name for chunk in policy.chunks for name, parameter in chunk.named_parameters()}
    return sorted(names[parameter] for parameter in names.keys() - set(processed))


def table_error(model: str, family: str, rows: tuple[Row, ...]) -> str:
    """The error of building a policy if the family has this table."""
    kept = TABLES[family]
    TABLES[family] = rows
    try:
        build(model, ["parallel.tp=1"])
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        TABLES[family] = kept
    return ""


def parameters(model: str, overrides: list[str]) -> dict[str, tuple[tuple[int, ...], str, tuple[tuple[int, int], ...]]]:
    """This rank's parameters by global name: shape, checkpoint key, leading (index, size) axes in the checkpoint."""
    from etr_megatron.policy.model import global_name

    policy = build(model, overrides)
    layout, arch = policy.layout, policy.arch
    first_expert = layout.ep_rank * arch.experts.count // layout.ep if arch.experts else 0
    found = {}
    for chunk in policy.chunks:
        stored = chunk.sharded_state_dict()
        buffers = [(name, buffer) for name, buffer in chunk.named_buffers() if name in chunk.state_dict()]
        for name, parameter in (*chunk.named_parameters(), *buffers):
            entry = stored[name]
            part = entry.build()[0] if hasattr(entry, "build") else entry
            axes = part.prepend_axis_num
            places = tuple(zip(part.global_offset[:axes], part.global_shape[:axes], strict=True))
            whole = global_name(name, chunk.decoder.layers[0].layer_number - 1, first_expert)
            found[whole] = (tuple(parameter.shape), entry.key, places)
    return found
