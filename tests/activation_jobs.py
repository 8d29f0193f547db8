"""Jobs that gang ranks run to count what a policy keeps for its backward passes.

Layers are Megatron's own, built by the policy's code. On CPU, norms and rotary embedding are not fused and keep more than
Transformer Engine's. `like_transformer_engine` replaces them with functions that save the same tensors as Transformer Engine
2.11 (the file of each is named below), wherever and however Megatron calls them. The gate is Megatron's fused one. Attention
and matrix products are torch's and Megatron's, which save the same as Transformer Engine's.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from etr_megatron.policy import Policy, model_config
from etr_megatron.policy.local_layers import LocalRMSNorm, PackedAttention
from tests.memory import Storages
from tests.policy_jobs import build, make_batch

_ROWS = 64
"""Rows at a time of what a fused kernel does in registers, so that no temporary of a tensor's full size is measured."""


class _Norm(torch.autograd.Function):
    """Saves its input, made contiguous, and an fp32 scale for every row: ops/basic/rmsnorm.py, and `inputmat` and `rsigma` of
    module/layernorm_linear.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        out = torch.empty_like(x)
        for to, rows, some in _by_rows(out, x, scale):
            some.copy_(torch.rsqrt(rows.float().pow(2).mean(-1) + eps))
            to.copy_((rows.float() * some[:, None]).to(x.dtype) * weight)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        of_input, of_weight = torch.empty_like(x), torch.zeros_like(ctx.weight, dtype=torch.float32)
        for to, own, rows, some in _by_rows(of_input, grad.contiguous(), x, scale):
            normed = rows.float() * some[:, None]
            wide = own.float() * ctx.weight.float()
            to.copy_((wide - normed * (wide * normed).mean(-1, keepdim=True)) * some[:, None])
            of_weight += (own.float() * normed).sum(0)
        return of_input, of_weight.to(ctx.weight.dtype), None


def _by_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of `_ROWS` rows of each at a time; the first tensors [..., H] and [...] are contiguous."""
    width = tensors[0].shape[-1]
    flat = [x.view(-1, width) if x.dim() == tensors[0].dim() else x.view(-1) for x in tensors]
    return zip(*(x.split(_ROWS) for x in flat), strict=True)


class Norm(LocalRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


class _Rope(torch.autograd.Function):
    """Saves the frequencies, which all layers share, and returns a new tensor: `FusedRoPEFunc` of attention/rope.py."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, freqs: Tensor) -> Tensor:
        ctx.save_for_backward(freqs)
        return _rotated(t, freqs, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rotated(grad, ctx.saved_tensors[0], -1.0), None


def _rotated(t: Tensor, freqs: Tensor, sign: float) -> Tensor:
    """t [T, heads, D] of one sequence; freqs may be of the first dimensions alone."""
    angles = freqs[: len(t), 0]
    first, rest = t.split((angles.shape[-1], t.shape[-1] - angles.shape[-1]), -1)
    left, right = first.float().chunk(2, -1)
    turned = torch.cat((-right, left), -1) * angles.sin() * sign
    return torch.cat(((first.float() * angles.cos() + turned).to(t.dtype), rest), -1)


def fused_rope(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int = 1, cp_rank: int = 0) -> Tensor:
    assert len(cu_seqlens) == 2 and cp_size == 1
    return _Rope.apply(t, freqs)


class _ByHeads(torch.autograd.Function):
    """Causal attention of values [1, heads, T, V] narrower than keys, which torch's flash attention refuses: padded, head by
    head. Saves what flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(value)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        for head in range(query.shape[1]):
            q, k, v = (x[:, head : head + 1] for x in (query, key, value))
            own, some = _FLASH(q, k, _as_wide(v, q), is_causal=True, scale=scale)
            out[:, head : head + 1], sums[:, head : head + 1] = own[..., : v.shape[-1]], some
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, sums = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        for head in range(query.shape[1]):
            q, k, v, o, s, g = (x[:, head : head + 1] for x in (query, key, value, out, sums, grad))
            wide = (_as_wide(x, q) for x in (v, o))
            own = _FLASH_BACKWARD(_as_wide(g, q), q, k, *wide, s, 0.0, True, scale=ctx.scale)
            for to, x in zip(grads, own, strict=True):
                to[:, head : head + 1] = x[..., : to.shape[-1]]
        return *grads, None


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _as_wide(narrow: Tensor, wide: Tensor) -> Tensor:
    return F.pad(narrow, (0, wide.shape[-1] - narrow.shape[-1]))


class Attention(PackedAttention):
    """For one sequence. Values are a part of the projection's output, with other strides than queries and keys, so that
    `get_qkv_layout` of attention/dot_product_attention/utils.py makes all three contiguous."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        split = (x.contiguous().transpose(0, 1)[None] for x in (query, key, value))
        if value.shape[-1] != query.shape[-1]:
            return _ByHeads.apply(*split, self.scale)[0].transpose(0, 1).flatten(1)
        out = F.scaled_dot_product_attention(*split, is_causal=True, scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


def _in_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply a function by rows, without temporaries of a tensor's full size, as the compiler does for Megatron's fused ones."""

    def run(*tensors: Tensor) -> Any:
        whole: tuple[Tensor, ...] = ()
        for number, part in enumerate(zip(*(x.split(_ROWS) for x in tensors), strict=True)):
            found = function(*part)
            several = found if isinstance(found, tuple) else (found,)
            whole = whole or tuple(x.new_empty(len(tensors[0]), *x.shape[1:]) for x in several)
            for to, x in zip(whole, several, strict=True):
                to[number * _ROWS :][:_ROWS].copy_(x)
        return whole if isinstance(found, tuple) else whole[0]

    return run


@contextlib.contextmanager
def like_transformer_engine() -> Iterator[None]:
    """Policies built and run in this context have layers that keep what Transformer Engine's keep."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models.common.embeddings import rope_utils

    gates = ("swiglu", "swiglu_back", "weighted_swiglu", "weighted_swiglu_back")
    fusions = dict(bias_activation_fusion=True, bias_dropout_fusion=True, apply_rope_fusion=True)
    with (
        mock.patch.object(model_config, "LocalRMSNorm", Norm),
        mock.patch.object(model_config, "PackedAttention", Attention),
        mock.patch.object(model_config, "_fusions", lambda fused, *, latent: fusions | {"apply_rope_fusion": not latent}),
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", fused_rope),
        mock.patch.multiple(fused_bias_swiglu, **{name: _in_rows(getattr(fused_bias_swiglu, name)) for name in gates}),
    ):
        yield


@dataclass
class LayerPass:
    """A forward pass of a layer. saved: bytes of storages saved for the first time in it, and not given up in it. routed:
    tokens given to the rank's experts."""

    layer: int
    saved: int = 0
    routed: int = 0


class Kept:
    """Bytes of storages, except parameters, that autograd has saved in a policy's layers and that are still alive ("layers"),
    and of the stage's outputs that the schedule holds ("outputs"), now and at their peaks."""

    def __init__(self, policy: Policy) -> None:
        self.passes: list[LayerPass] = []
        self.now = {"layers": 0, "outputs": 0}
        self.peak = dict(self.now)
        self._alive = {x.untyped_storage()._cdata for chunk in policy.chunks for x in chunk.parameters()}
        self._inside: list[str] = []
        for chunk in policy.chunks:
            # Between layers, a block saves what it needs to recompute each.
            chunk.decoder.register_forward_pre_hook(lambda *_: self._inside.append("block"))
            chunk.decoder.register_forward_hook(partial(self._hand_on, last=chunk.post_process))
            if chunk.post_process:
                chunk.decoder.final_layernorm.register_forward_pre_hook(lambda *_: self._inside.clear())
            for layer in chunk.decoder.layers:
                layer.register_forward_pre_hook(self._enter)
                layer.register_forward_hook(lambda *_: self._inside.remove("layer"))
                if hasattr(layer.mlp, "experts"):
                    layer.mlp.experts.register_forward_pre_hook(self._route)

    def _enter(self, layer: torch.nn.Module, *_given: Any) -> None:
        self._inside.append("layer")
        self.passes.append(LayerPass(layer.layer_number - 1))

    def _route(self, _experts: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        self.passes[-1].routed = len(given[0])

    def _hand_on(self, _block: torch.nn.Module, _given: Any, output: Tensor, *, last: bool) -> None:
        self._inside.clear()
        if not last:
            self._count(output.untyped_storage(), "outputs")

    def pack(self, tensor: Tensor) -> Tensor:
        """Hook for `saved_tensors_hooks`."""
        if self._inside:
            self._count(tensor.untyped_storage(), "layers", self.passes[-1] if "layer" in self._inside else None)
        return tensor.detach()

    def _count(self, storage: torch.UntypedStorage, kind: str, one: LayerPass | None = None) -> None:
        """one: the pass in which it is saved, if any."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now[kind] += size
        self.peak[kind] = max(self.peak[kind], self.now[kind])
        if one is not None:
            one.saved += size
        weakref.finalize(storage, self._forget, key, size, kind, one)

    def _forget(self, key: int, size: int, kind: str, one: LayerPass | None) -> None:
        self._alive.remove(key)
        self.now[kind] -= size
        if one is not None and "layer" in self._inside and one is self.passes[-1]:
            one.saved -= size


def kept(model: str, sequences: Sequence, overrides: Sequence[str], updates: int = 10) -> dict[str, Any]:
    """What an update keeps, with each sample in its own microbatch: the passes of the first of several updates, and the
    smallest of their peaks, since gloo's threads may hold a tensor a little longer. It has to come twice on every rank.

    updates: at most so many; with 1 the peaks may be too high."""
    peaks: list[dict[str, int]] = []
    with like_transformer_engine():
        policy = _policy(model, sequences, overrides)
        found = Kept(policy)
        while len(peaks) < updates and not _is_there_twice(peaks):
            _settle()
            found.peak = dict(found.now)
            with torch.autograd.graph.saved_tensors_hooks(found.pack, lambda tensor: tensor):
                policy.update(make_batch(list(sequences)))
            peaks.append(found.peak)
    _settle()
    passes = [one for one in found.passes[: len(found.passes) // len(peaks)] if one.saved]
    return {"passes": passes, "left": found.now, "peak": {kind: min(peak[kind] for peak in peaks) for kind in found.now}}


def _is_there_twice(peaks: Sequence[dict[str, int]]) -> bool:
    """Whether on every rank the smallest peak of each kind is that of two updates. A collective."""
    both = [sorted(peak[kind] for peak in peaks)[:2] for kind in (peaks[0] if peaks else {"none": 0})]
    here = torch.tensor(int(all(len(two) == 2 and two[0] == two[1] for two in both)))
    dist.all_reduce(here, op=dist.ReduceOp.MIN)
    return bool(here)


def _policy(model: str, sequences: Sequence, overrides: Sequence[str]) -> Policy:
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    return build(model, ["model.dtype=bfloat16", f"train.tokens_per_microbatch={longest}", *overrides])


def gradient_norms(model: str, sequences: Sequence, overrides: Sequence[str]) -> tuple[float, float]:
    """Gradient norms of an update with the stand-ins, and of one without."""
    batch = make_batch(list(sequences))
    with like_transformer_engine():
        other = _policy(model, sequences, overrides).update(batch)
    return other.grad_norm, _policy(model, sequences, overrides).update(batch).grad_norm


def around_head(model: str, sequences: Sequence, overrides: Sequence[str]) -> int:
    """Peak bytes of tensors between the last norm's forward and backward passes, beyond those alive before."""
    seen: dict[str, int] = {}
    with like_transformer_engine():
        policy = _policy(model, sequences, overrides)
        norm = policy.chunks[-1].decoder.final_layernorm
        with Storages() as storages:
            norm.register_forward_pre_hook(lambda *_: seen.update(before=_settled(storages)))
            norm.register_full_backward_pre_hook(lambda *_: seen.update(peak=storages.peak))
            policy.update(make_batch(list(sequences)))
    return seen["peak"] - seen["before"]


def around_backward(model: str, batches: Sequence[Sequence], overrides: Sequence[str]) -> list[int]:
    """Peak bytes of tensors in the last layer's backward pass of each batch, beyond those alive before its forward pass: the
    smallest of several updates, since gloo's threads may hold a tensor a little longer. The first batch is the longest."""
    from megatron.core.parallel_state import get_global_memory_buffer

    seen: dict[str, int] = {}
    found: list[int] = []
    again = 2 if dist.get_world_size() > 1 else 1

    def before(_layer: torch.nn.Module, _given: Any, named: dict[str, Tensor]) -> None:
        get_global_memory_buffer().buffer.clear()  # else its presence depends on earlier calls
        seen["before"] = _settled(storages)
        named["hidden_states"].register_hook(lambda _grad: seen.update(peak=storages.peak))

    def after(_layer: torch.nn.Module, _given: Any, made: tuple[Tensor, ...]) -> None:
        made[0].register_hook(lambda _grad: seen.update(forward=_settled(storages)))

    with like_transformer_engine():
        policy = _policy(model, batches[0], overrides)
        layer = policy.chunks[-1].decoder.layers[-1]
        with Storages() as storages:
            layer.register_forward_pre_hook(before, with_kwargs=True)
            layer.register_forward_hook(after)
            for sequences in batches:
                batch, peaks = make_batch(list(sequences)), []
                for _ in range(again):
                    policy.update(batch)
                    peaks.append(seen["peak"] - seen["before"])
                found.append(min(peaks))
    return found


def _settled(storages: Storages) -> int:
    """Restart the peak once gloo's threads have released their tensors; returns the bytes alive then."""
    _settle()
    return storages.restart()


def _settle() -> None:
    """Wait until gloo's threads have released the tensors of what is over: until, two looks on end, all of them sleep."""
    asleep = 0
    while dist.get_world_size() > 1 and asleep < 2:
        time.sleep(0.02)
        asleep = asleep + 1 if set(_states_of_gloo()) <= {"S"} else 0


def _states_of_gloo() -> list[str]:
    """States (S: asleep) of the threads that run this process's collectives."""
    states = []
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has ended
            name, _, rest = path.read_text().rpartition(")")
            states += [rest.split()[0]] if name.endswith("(pt_gloo_runloop") else []
    return states
