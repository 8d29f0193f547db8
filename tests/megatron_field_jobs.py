"""Jobs that gang ranks run with fields of Megatron in `train.megatron`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

from etr_megatron.errors import UserError
from etr_megatron.policy import Policy
from tests.policy_jobs import build, make_batch

BASE = [
    # With these Adam's step is lr g / (|g| + 1) in every update, so the weights show the gradients one to one.
    *("train.lr=1", "train.adam_eps=1", "train.adam_beta1=0", "train.adam_beta2=0", "train.clip_grad=0"),
    *("train.head_chunk_rows=7", "train.tokens_per_microbatch=40"),
]


def updates(model: str, sequences: list, overrides: list[str], fields: list[str]) -> list[dict[str, Any]]:
    """One update without fields, then one with each of `fields` (YAML mappings), all from the same weights and old log-probs.

    Returns per update: the loss, the norm of the gradient, the weights after it, how often this rank ran each module, and the
    sizes of its buckets of gradients.
    """
    # Set once for all policies of a process, which a job has one of.
    from megatron.core.distributed import param_and_grad_buffer

    found: list[dict[str, Any]] = []
    batch = None
    reduce_scatter = param_and_grad_buffer.dist_reduce_scatter_func
    for given in ["{}", *fields]:
        with mock.patch.object(param_and_grad_buffer, "dist_reduce_scatter_func", reduce_scatter):
            policy = build(model, [*BASE, *overrides, f"train.megatron={given}"])
            sums_itself = param_and_grad_buffer.dist_reduce_scatter_func is not reduce_scatter
            if batch is None:
                batch = make_batch(sequences)
                batch = replace(batch, old_logp=policy.logprobs(batch.sequences).logp)
            policy.update(replace(batch, weight=0 * batch.weight))  # Megatron overlaps nothing in its first update
            passes = _count_passes(policy)
            update = policy.update(batch)
            weights = {name: tensor.clone() for name, tensor in policy.export()}
        buckets = [bucket.grad_data.numel() for ddp in policy._ddp for buffer in ddp.buffers for bucket in buffer.buckets]
        told = {"passes": dict(passes), "buckets": buckets, "sums_itself": sums_itself}
        found.append({"loss": update.loss, "norm": update.grad_norm, "weights": weights, **told})
    return found


def _count_passes(policy: Policy) -> Counter[str]:
    """Forward passes of every module of this rank, by chunk and name, from now on."""
    passes: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: passes.update([name])

    for number, chunk in enumerate(policy.chunks):
        for name, module in chunk.named_modules():
            module.register_forward_pre_hook(count(f"{number}.{name}"))
    return passes


def refusal(model: str, overrides: list[str]) -> str:
    """What a policy says that cannot be built."""
    try:
        build(model, overrides)
    except UserError as error:
        return str(error)
    return ""
