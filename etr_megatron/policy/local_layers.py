"""The two layers that megatron-core's local spec lacks for packed sequences without Transformer Engine.

`WrappedTorchNorm` refuses sequence parallelism, `DotProductAttention` refuses packed sequences (THD).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class LocalRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, statistics in fp32.

    The weight is marked `sequence_parallel`, so that Megatron sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of `x` [..., hidden_size]."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def _length_buckets(lengths: list[int]) -> list[list[int]]:
    """Sequence numbers grouped so that the longest of a bucket is at most twice its shortest: bounded padding."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if buckets and lengths[index] <= 2 * lengths[buckets[-1][0]]:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences by torch's scaled_dot_product_attention.

    Sequences of similar length are padded on the right into one batch: under a causal mask a real token never sees the padding
    behind it, so no mask is needed and the result does not depend on the bucket.
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
        pieces, places = [], []
        for bucket in _length_buckets(lengths):
            longest = max(lengths[i] for i in bucket)
            column = torch.arange(longest, device=query.device)
            begin = torch.tensor([offsets[i] for i in bucket], device=query.device)[:, None]
            real = column < torch.tensor([lengths[i] for i in bucket], device=query.device)[:, None]
            at = torch.where(real, begin + column, begin)  # [B, S]; padding repeats the first token, its output is dropped
            out = self._attend(*(x[at].transpose(1, 2) for x in (query, key, value)))
            pieces.append(out.transpose(1, 2)[real])
            places.append(at[real])
        order = torch.cat(places).argsort()
        return torch.cat(pieces)[order].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, heads, S, D] each, fewer heads for key and value; causal."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped)
