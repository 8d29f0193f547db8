"""Block quantisation to FP8, as checkpoints with `quant_method: fp8` and a `weight_block_size` hold it.

Every block of 128 x 128 values has a scale of its own that takes its largest value to the largest that e4m3 has. Stored are the
scaled values and, as `weight_scale_inv`, what to multiply them with. The arithmetic is that of Transformer Engine's blockwise
recipe with fp32 scales, so that a server computes with the values that the trainer computed with; blocks of nothing above
2^-116 alone count as zeros here. Transformers' fine-grained FP8 rounds a scale twice: it is up to two of fp32's steps from
ours, and hence differs in few codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
"""Rows and columns of a block in every published checkpoint."""

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max

_SMALLEST = 2.0**-116
"""A block without a larger value counts as zero: the scale or its inverse would leave fp32's normal range."""


def scale_shape(rows: int, cols: int, block: int = BLOCK) -> tuple[int, int]:
    """Blocks in each dimension; the last ones may be cut off."""
    return -(-rows // block), -(-cols // block)


def _blocks(matrix: Tensor, block: int) -> Tensor:
    """fp32 [row blocks, block, column blocks, block], filled up with zeros."""
    rows, cols = matrix.shape
    row_blocks, col_blocks = scale_shape(rows, cols, block)
    full = pad(matrix.float(), (0, col_blocks * block - cols, 0, row_blocks * block - rows))
    return full.view(row_blocks, block, col_blocks, block)


def _matrix(blocks: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `_blocks`."""
    return blocks.flatten(2).flatten(0, 1)[:rows, :cols].contiguous()


@torch.no_grad()
def quantize_blocks(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise a matrix block by block.

    weight: [rows, cols], fp32 or bf16, finite; not written to. Returns float8_e4m3fn [rows, cols] and fp32 scale_inv
    [ceil(rows / block), ceil(cols / block)], both new. The last blocks may be smaller; a block of zeros has scale 1. Values
    within the range stay in it: they are clamped before the cast, which would turn a larger one into NaN. A block with a value
    that is not finite becomes NaN when dequantised, all of it.
    """
    rows, cols = weight.shape
    blocks = _blocks(weight, block)
    largest = blocks.abs().amax(dim=(1, 3))
    # A comparison that NaN fails, so that NaN keeps its way into the scale.
    # A division of tensors: torch turns that of a number by a tensor into a product with the reciprocal, which rounds twice.
    scale = torch.where(largest <= _SMALLEST, 1.0, torch.full_like(largest, _LARGEST) / largest)
    scaled = (blocks * scale[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
    return _matrix(scaled, rows, cols).to(FP8), 1.0 / scale


@torch.no_grad()
def dequantize_blocks(quantized: Tensor, scale_inv: Tensor, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `quantize_blocks` returned as a new [rows, cols] matrix of `dtype`; the product is formed in fp32.

    Raises ValueError where the scales' shape does not fit.
    """
    rows, cols = quantized.shape
    if tuple(scale_inv.shape) != scale_shape(rows, cols, block):
        raise ValueError(
            f"scale_inv is {tuple(scale_inv.shape)}; blocks of {block} in {rows} x {cols} need {scale_shape(rows, cols, block)}"
        )
    return _matrix(_blocks(quantized, block) * scale_inv[:, None, :, None], rows, cols).to(dtype)
