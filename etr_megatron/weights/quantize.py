"""Block quantisation to FP8, as in checkpoints with `quant_method: fp8` and a `weight_block_size`.

Every block, usually of 128 x 128 values, has its own scale, which maps the block's largest value to the largest e4m3 value. A
checkpoint stores the scaled values and, as `weight_scale_inv`, the factors that restore them. The arithmetic is that of
Transformer Engine's blockwise recipe with fp32 scales, so that a server computes with the same values as the trainer; the only
difference is that blocks without a value above 2^-116 count as zeros here. Transformers' fine-grained FP8 rounds a scale twice:
its scales are up to two fp32 ulps from these, so a few codes differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALE_SUFFIX = "_scale_inv"
"""Suffix of the scales' name: it is the quantised weight's name plus this."""

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max

_MIN_ABS_MAX = 2.0**-116
"""Blocks without a larger absolute value count as zero: the scale or its inverse would leave fp32's normal range."""

_PANEL, _CPU_PANEL = 2**26, 2**19
"""Number of values quantised at a time: fp32 copies take a quarter of a GB on a GPU; on a CPU they stay in its cache."""


def scale_shape(size: Sequence[int], block: int) -> tuple[int, int]:
    """Number of blocks in each dimension of a matrix of `size`; the last ones may be partial."""
    rows, cols = size
    return -(-rows // block), -(-cols // block)


def _panels(rows: int, cols: int, block: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Whole rows of blocks to process at a time: (rows, rows of blocks)."""
    step = max(1, (_CPU_PANEL if device.type == "cpu" else _PANEL) // (block * max(1, cols)))
    for first in range(0, -(-rows // block), step):
        yield slice(first * block, (first + step) * block), slice(first, first + step)


def _blocks(matrix: Tensor, block: int) -> Tensor:
    """fp32 [row blocks, block, column blocks, block], partial blocks padded with zeros."""
    rows, cols = matrix.shape
    row_blocks, col_blocks = scale_shape((rows, cols), block)
    full = matrix.float()
    if (rows, cols) != (row_blocks * block, col_blocks * block):
        full = pad(full, (0, col_blocks * block - cols, 0, row_blocks * block - rows))
    return full.reshape(row_blocks, block, col_blocks, block)


@torch.no_grad()
def quantize_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise a matrix block by block.

    weight: [rows, cols], fp32 or bf16, finite; not written to. Returns float8_e4m3fn [rows, cols] and fp32 scale_inv
    [ceil(rows / block), ceil(cols / block)], both new. The last blocks may be smaller; a block of zeros has scale 1. Scaled
    values are clamped before the cast, which would turn one beyond the range into NaN. A block with a value that is not finite
    becomes all NaN when dequantised.
    """
    rows, cols = weight.shape
    values = torch.empty(rows, cols, dtype=FP8, device=weight.device)
    scale_inv = torch.empty(scale_shape((rows, cols), block), dtype=torch.float32, device=weight.device)
    for some, block_rows in _panels(rows, cols, block, weight.device):
        blocks = _blocks(weight[some], block)
        largest = blocks.abs().amax(dim=(1, 3))
        # NaN fails this comparison, so that it propagates into the scale.
        # Tensor by tensor: torch divides a number by a tensor as a product with the reciprocal, which rounds twice.
        scale = torch.where(largest <= _MIN_ABS_MAX, 1.0, torch.full_like(largest, _FP8_MAX) / largest)
        scaled = (blocks * scale[:, None, :, None]).clamp_(-_FP8_MAX, _FP8_MAX)
        panel = values[some]
        panel.copy_(scaled.flatten(2).flatten(0, 1)[: panel.shape[0], :cols])
        scale_inv[block_rows] = 1.0 / scale
    return values, scale_inv


@torch.no_grad()
def dequantize_box(quantized: Tensor, scale_inv: Tensor, out: Tensor, block: int, begin: tuple[int, int] = (0, 0)) -> None:
    """Dequantise a result of `quantize_blocks`: a whole matrix, or a box that need not be aligned to blocks.

    quantized: float8_e4m3fn [rows, cols]. scale_inv: fp32, of the blocks that the box touches. out: [rows, cols], the caller's,
    overwritten with the products, which are computed in fp32. begin: row and column of the matrix at which the box begins.
    Raises ValueError when the scales' shape does not fit.
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

    On a CPU torch converts float8 one value at a time. But a code, read as an fp16 with the same exponent and fraction bits, is
    its value times 2^-8, subnormals included, and torch's conversion of fp16 is vectorized: ten times as fast. NaN is lost.
    """
    bits = codes.view(torch.int8)
    if codes.device.type != "cpu" or not codes.numel() or bits.max() == 0x7F or codes.view(torch.uint8).max() == 0xFF:
        return codes.float()
    # The cast to int16 extends the sign. After the shift, the sign fills the two uppermost bits, and the second one is cleared.
    return ((bits.short() << 7) & ~0x4000).view(torch.float16).float().mul_(2.0**8)
