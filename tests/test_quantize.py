"""FP8 blocks: bit-equal to the definition in NumPy, and to transformers except for a scale's rounding; stable; safe with zeros
and ragged ends."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etr_megatron.weights.quantize import dequantize_box, quantize_blocks

FP8 = torch.float8_e4m3fn


def dequantize_blocks(
    quantized: torch.Tensor, scale_inv: torch.Tensor, block: int = 128, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    out = torch.empty(quantized.shape, dtype=dtype)
    dequantize_box(quantized, scale_inv, out, block)
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(bits(a[0]), bits(b[0])) and torch.equal(a[1], b[1])


def random_matrix(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values over many orders of magnitude, with a block of zeros and blocks of one value."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator) * torch.exp(3 * torch.randn(rows, cols, generator=generator))
    matrix[:128, :128] = 0
    matrix[-40:, -130:] = -0.3
    return matrix.to(dtype)


def transformers_blocks(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=(block, block), scale_fmt="float")
    found = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("x.weight", weight)
    return found["x.weight"], found["x.weight_scale_inv"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols", "block"), [(256, 384, 128), (384, 128, 128), (96, 160, 32)])
def test_equals_transformers_but_for_up_to_two_steps_of_a_scale(rows, cols, block, dtype):
    weight = random_matrix(rows, cols, dtype)
    (codes, scales), (their_codes, their_scales) = quantize_blocks(weight, block), transformers_blocks(weight, block)
    steps = (scales.view(torch.int32) - their_scales.view(torch.int32)).abs()
    assert steps.max() <= 2
    same_scale = (steps == 0).repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert same_scale.float().mean() > 0.3
    assert torch.equal(bits(codes)[same_scale], bits(their_codes)[same_scale])
    # Codes differ by at most one, if a value lies on the border between two.
    assert (bits(codes).int() - bits(their_codes).int()).abs().max() <= 1
    assert (bits(codes) == bits(their_codes)).float().mean() > 0.999


def e4m3_values() -> np.ndarray:
    """The 127 non-negative finite numbers of e4m3fn by their bit pattern: exponent bias 7, 3 bits of mantissa."""
    patterns = np.arange(127)
    exponent, mantissa = patterns >> 3, patterns & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7))


def numpy_block(block: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Bit patterns and scale_inv of one fp32 block, rounded to nearest even, from the list of representable numbers."""
    largest = np.abs(block).max()
    scale = np.float32(448) / largest if largest > 0 else np.float32(1)
    scaled = np.minimum(np.abs(block * scale), np.float32(448)).astype(np.float64)
    values = e4m3_values()
    above = np.minimum(np.searchsorted(values, scaled), 126)
    below = np.maximum(above - 1, 0)
    up, down = values[above] - scaled, scaled - values[below]
    nearest = np.where(up < down, above, np.where(down < up, below, np.where(above % 2 == 0, above, below)))
    nearest = np.where(scaled == values[above], above, nearest)
    return (nearest + 128 * np.signbit(block)).astype(np.uint8), np.float32(1) / scale


@pytest.mark.parametrize(("rows", "cols", "block"), [(200, 300, 128), (1, 129, 128), (130, 7, 32), (31, 31, 32)])
def test_ragged_ends_equal_the_definition_block_by_block(rows, cols, block):
    weight = random_matrix(rows, cols, torch.float32, seed=1)
    quantized, scale_inv = quantize_blocks(weight, block)
    assert quantized.dtype == FP8 and scale_inv.shape == (-(-rows // block), -(-cols // block))
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            expected, scale = numpy_block(weight[at].numpy())
            assert np.array_equal(bits(quantized[at].contiguous()).numpy(), expected)
            assert scale_inv[i, j].item() == scale


def test_a_matrix_of_several_panels_equals_its_rows_of_blocks_one_by_one():
    weight = random_matrix(1200, 1000, torch.bfloat16, seed=5)  # a panel holds 4 rows of blocks
    quantized, scale_inv = quantize_blocks(weight, 128)
    for i in range(10):
        rows = slice(i * 128, (i + 1) * 128)
        values, scales = quantize_blocks(weight[rows], 128)
        assert torch.equal(bits(quantized[rows]), bits(values)) and torch.equal(scale_inv[i : i + 1], scales)


@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-126 * 0.37, 2.0**119 * 1.7], ids=["1", "0.1", "subnormal", "infinite"])
def test_every_code_is_dequantised_to_torchs_own_conversion_times_the_scale(scale):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(FP8)
    finite = codes.float().isfinite()
    for some in (codes, torch.where(finite, codes.float(), 0.0).to(FP8)):  # with both NaNs, and without them
        found = dequantize_blocks(some, torch.full((1, 1), scale))
        # As bits, so that NaN equals itself and -0 differs from 0.
        assert torch.equal(found.view(torch.int32), (some.float() * torch.tensor(scale)).view(torch.int32))


@given(
    begin=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    out=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_box_that_begins_and_ends_within_blocks_is_a_cut_of_the_whole(begin, size, out):
    block = 8
    quantized, scale_inv = quantize_blocks(random_matrix(70, 70, torch.float32, seed=6), block)
    cut = tuple(slice(at, at + count) for at, count in zip(begin, size, strict=True))
    touched = tuple(slice(at.start // block, -(-at.stop // block)) for at in cut)
    into = torch.empty(50, 50, dtype=torch.bfloat16)[: size[0], : size[1]] if out else torch.empty(size)
    dequantize_box(quantized[cut], scale_inv[touched], into, block, begin)
    assert torch.equal(into, dequantize_blocks(quantized, scale_inv, block, into.dtype)[cut])


def test_a_block_of_zeros_has_scale_one_and_comes_back_as_zeros():
    weight = torch.zeros(130, 257, dtype=torch.bfloat16)
    weight[0, 0] = 1e-38  # its scale would be infinite in fp32
    quantized, scale_inv = quantize_blocks(weight, 128)
    assert torch.equal(scale_inv, torch.ones(2, 3))
    assert torch.equal(dequantize_blocks(quantized, scale_inv), torch.zeros(130, 257))


def test_the_largest_value_of_a_block_never_becomes_nan():
    """Scaling can round to values above 448, which a bare cast turns into NaN."""
    largest = torch.rand(4096, generator=torch.Generator().manual_seed(3)) + 1.0
    for value in largest.view(64, 64):
        quantized, _ = quantize_blocks(value[:, None], block=1)
        assert torch.equal(quantized.float(), torch.full((64, 1), 448.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_its_block_and_no_other(value):
    weight = torch.ones(64, 96)
    weight[40, 70] = value
    back = dequantize_blocks(*quantize_blocks(weight, 32), 32)
    assert back[32:, 64:].isnan().all()
    back[32:, 64:] = 1
    assert torch.equal(back, torch.ones(64, 96))


def test_scales_of_another_shape_are_refused():
    quantized, scale_inv = quantize_blocks(torch.ones(130, 200), 128)
    with pytest.raises(ValueError, match=r"scale_inv is \(2, 1\); blocks of 128 in 130 x 200 need \(2, 2\)"):
        dequantize_blocks(quantized, scale_inv[:, :1])


@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    seed=st.integers(0, 2**20),
    exponent=st.integers(-130, 120),
    spread=st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_bf16_to_fp8_to_bf16_to_fp8_is_stable_and_close(rows, cols, seed, exponent, spread):
    generator = torch.Generator().manual_seed(seed)
    mantissas = torch.randn(rows, cols, generator=generator)
    exponents = exponent - spread * torch.rand(rows, cols, generator=generator)
    weight = (mantissas * torch.exp2(exponents)).to(torch.bfloat16)
    first = quantize_blocks(weight, 8)
    back = dequantize_blocks(*first, 8, dtype=torch.bfloat16)
    again = quantize_blocks(back, 8)
    assert same(first, again)
    assert torch.equal(back, dequantize_blocks(*again, 8, dtype=torch.bfloat16))
    # Half a step of 3 mantissa bits, or half of the smallest step, plus bf16's own rounding.
    bound = weight.float().abs() * (2**-4 + 2**-8) + first[1].max() * 2**-10
    if exponent > -100:
        assert ((back.float() - weight.float()).abs() <= bound).all()
