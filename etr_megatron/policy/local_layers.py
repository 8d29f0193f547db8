"""Two layers missing from megatron-core's local spec, for packed sequences without Transformer Engine.

`WrappedTorchNorm` refuses sequence parallelism, `DotProductAttention` refuses packed sequences (THD).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from etr_megatron.policy.context import gathered_order, own_positions


class LocalRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, statistics in fp32.

    The weight carries Megatron's `sequence_parallel` flag, which makes it sum the gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark

    def forward(self, x: Tensor) -> Tensor:
        """Normalized `x` [..., hidden_size], same shape and dtype."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def _length_buckets(lengths: list[int]) -> list[list[int]]:
    """Sequence indices grouped so that the longest in a bucket is at most twice the shortest, which bounds padding."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if buckets and lengths[index] <= 2 * lengths[buckets[-1][0]]:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences with torch's scaled_dot_product_attention.

    Sequences of similar length are right-padded into one batch: under a causal mask a real token never sees the padding
    after it, so no mask is needed and the result does not depend on the bucket. With context parallelism, keys and values are
    gathered from all ranks, and a rank's queries attend to them under a mask built from positions.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [T, heads, D], key and value [T, kv heads, D] packed -> [T, heads * D]; or with a batch dimension, [S, B, ., D]
        -> [S, B, heads * D], causal and without padding on the left."""
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        offsets = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
        cp = self.config.context_parallel_size
        positions = own_positions(lengths, cp, mpu.get_context_parallel_rank() if cp > 1 else 0).to(query.device)
        if cp > 1:
            key, value = (_gather(x, lengths, cp) for x in (key, value))
        pieces, places = [], []
        for bucket in _length_buckets(lengths):
            of_keys, real_keys = _places(offsets, bucket, 1, query.device)
            at, real = _places(offsets, bucket, cp, query.device) if cp > 1 else (of_keys, real_keys)
            # A padded key repeats the first token, but its column index masks it from every query.
            columns = torch.arange(of_keys.shape[1], device=query.device)
            seen = positions[at][:, None, :, None] >= columns if cp > 1 else None
            q, k, v = (x[i].transpose(1, 2) for x, i in ((query, at), (key, of_keys), (value, of_keys)))
            out = self._attend(q, k, v, seen)
            pieces.append(out.transpose(1, 2)[real])
            places.append(at[real])
        order = torch.cat(places).argsort()
        return torch.cat(pieces)[order].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """[B, heads, S, D] each, key and value may have fewer heads; causal, or masked by `seen` [B, 1, queries, keys]."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=self.scale, enable_gqa=grouped
        )


def _places(offsets: list[int], bucket: list[int], share: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(indices of the bucket's tokens [B, S], whether each is real [B, S]); padding repeats the first token.

    share: number of ranks that share the tokens of every sequence.
    """
    begin = torch.tensor([offsets[i] // share for i in bucket], device=device)[:, None]
    count = torch.tensor([(offsets[i + 1] - offsets[i]) // share for i in bucket], device=device)[:, None]
    column = torch.arange(int(count.max()), device=device)
    real = column < count
    return torch.where(real, begin + column, begin), real


def _gather(own: Tensor, lengths: list[int], cp: int) -> Tensor:
    """Gather [T / CP, ...] from the context-parallel ranks as [T, ...] in packed order; backward reduce-scatters."""
    whole = gather_from_sequence_parallel_region(own.contiguous(), group=mpu.get_context_parallel_group())
    return whole[gathered_order(lengths, cp).to(own.device)]
