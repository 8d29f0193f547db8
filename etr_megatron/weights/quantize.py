"""Block quantisation to FP8, as checkpoints with `quant_method: fp8` and a `weight_block_size` hold it.

Every block of 128 x 128 values has a scale of its own that takes its largest value to the largest that e4m3 has. Stored are the
scaled values and, as `weight_scale_inv`, what to multiply them with. The arithmetic is that of Transformer Engine's blockwise
recipe with fp32 scales, so that a server computes with the values that the trainer computed with; blocks of nothing above
2^-116 alone count as zeros here. Transformers' fine-grained FP8 rounds a scale twice: it is up to two of fp32's steps from
ours, and hence differs in few codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
"""Rows and columns of a block in every published checkpoint."""

SCALE_SUFFIX = "_scale_inv"
"""The scales of a quantised weight stand under its name with this behind it."""

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max

_SMALLEST = 2.0**-116
"""A block without a larger value counts as zero: the scale or its inverse would leave fp32's normal range."""

_PANEL, _CPU_PANEL = 2**26, 2**19
"""Values that are quantised at a time: copies in fp32 are a quarter of a GB on a GPU; on a CPU they stay in its cache."""


def scale_shape(size: Sequence[int], block: int = BLOCK) -> tuple[int, int]:
    """Blocks in each dimension of a matrix of `size`; the last ones may be cut off."""
    rows, cols = size
    return -(-rows // block), -(-cols // block)


def _panels(rows: int, cols: int, block: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Whole rows of blocks to work on at a time: (rows, rows of blocks)."""
    step = max(1, (_CPU_PANEL if device.type == "cpu" else _PANEL) // (block * max(1, cols)))
    for first in range(0, -(-rows // block), step):
        yield slice(first * block, (first + step) * block), slice(first, first + step)


def _blocks(matrix: Tensor, block: int) -> Tensor:
    """fp32 [row blocks, block, column blocks, block], filled up with zeros where a block is cut off."""
    rows, cols = matrix.shape
    row_blocks, col_blocks = scale_shape((rows, cols), block)
    full = matrix.float()
    if (rows, cols) != (row_blocks * block, col_blocks * block):
        full = pad(full, (0, col_blocks * block - cols, 0, row_blocks * block - rows))
    return full.reshape(row_blocks, block, col_blocks, block)


@torch.no_grad()
def quantize_blocks(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise a matrix block by block.

    weight: [rows, cols], fp32 or bf16, finite; not written to. Returns float8_e4m3fn [rows, cols] and fp32 scale_inv
    [ceil(rows / block), ceil(cols / block)], both new. The last blocks may be smaller; a block of zeros has scale 1. Values
    within the range stay in it: they are clamped before the cast, which would turn a larger one into NaN. A block with a value
    that is not finite becomes NaN when dequantised, all of it.
    """
    rows, cols = weight.shape
    values = torch.empty(rows, cols, dtype=FP8, device=weight.device)
    scale_inv = torch.empty(scale_shape((rows, cols), block), dtype=torch.float32, device=weight.device)
    for some, block_rows in _panels(rows, cols, block, weight.device):
        blocks = _blocks(weight[some], block)
        largest = blocks.abs().amax(dim=(1, 3))
        # A comparison that NaN fails, so that NaN keeps its way into the scale.
        # A division of tensors: that of a number by a tensor is to torch a product with the reciprocal, which rounds twice.
        scale = torch.where(largest <= _SMALLEST, 1.0, torch.full_like(largest, _LARGEST) / largest)
        scaled = (blocks * scale[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
        panel = values[some]
        panel.copy_(scaled.flatten(2).flatten(0, 1)[: panel.shape[0], :cols])
        scale_inv[block_rows] = 1.0 / scale
    return values, scale_inv


@torch.no_grad()
def dequantize_box(
    quantized: Tensor, scale_inv: Tensor, out: Tensor, block: int = BLOCK, begin: tuple[int, int] = (0, 0)
) -> None:
    """What `quantize_blocks` returned as values again: all of a matrix, or a box that need not begin or end where a block does.

    quantized: float8_e4m3fn [rows, cols]. scale_inv: fp32, of the blocks that the box touches. out: [rows, cols], the caller's,
    overwritten with the products, which are formed in fp32. begin: row and column of the matrix at which the box begins. Raises
    ValueError where the scales' shape does not fit.
    """
    rows, cols = quantized.shape
    row, col = (at % block for at in begin)
    wanted = scale_shape((row + rows, col + cols), block)
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(f"scale_inv is {tuple(scale_inv.shape)}; blocks of {block} in {rows} x {cols} need {wanted}")
    for index, scales in enumerate(scale_inv):
        some = slice(max(0, index * block - row), (index + 1) * block - row)
        factors = scales.repeat_interleave(block)[col : col + cols]
        out[some] = _to_fp32(quantized[some]).mul_(factors)


def _to_fp32(codes: Tensor) -> Tensor:
    """float8_e4m3fn as new fp32 values.

    torch converts them one by one on a CPU. As an fp16 with the same exponent and fraction bits, a code is its value times
    2^-8, with subnormal ones among them, and torch converts those many at a time: ten times as fast. NaN has no place there.
    """
    bits = codes.view(torch.int8)
    if codes.device.type != "cpu" or not codes.numel() or bits.max() == 0x7F or codes.view(torch.uint8).max() == 0xFF:
        return codes.float()
    # An int8 fills an int16 with its sign; shifted by 7 bits that stands in the uppermost two, of which the sign is the first.
    return ((bits.short() << 7) & ~0x4000).view(torch.float16).float().mul_(2.0**8)
