"""Merging of low-rank adapters with shards of weights."""

from __future__ import annotations

import json

import pytest
import torch

from etr_megatron.errors import UserError
from etr_megatron.weights import LowRank, read_architecture
from etr_megatron.weights.low_rank import Adapter, _rounded, add_products, bit_sum
from etr_megatron.weights.shards import Piece, Shard, box

ROWS, COLUMNS = 384, 640


def adapter(rank: int = 5, module: str = "model.layers.3.self_attn.o_proj") -> Adapter:
    return Adapter(0, module, rank, ROWS, COLUMNS, 0.7)


def whole() -> Shard:
    return Shard((ROWS, COLUMNS), (Piece(0, (0, 0), (0, 0), (ROWS, COLUMNS)),))


def base(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (0.02 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))).to(dtype)


def factors(size: float, rank: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rank, COLUMNS, generator=generator), size * torch.randn(ROWS, rank, generator=generator)


def test_a_float32_weight_is_the_exact_sum_rounded_once():
    a, b = factors(1e-4)
    exact = base(torch.float32).double() + 0.7 * b.double() @ a.double()
    found = add_products(base(torch.float32), whole(), {0: (adapter(), (a, b))})
    assert found.dtype == torch.float32 and torch.equal(found, exact.float())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)])
def test_sum_of_bits_counts_every_element_of_a_view(dtype, bits):
    values = base(dtype).t()[3:, 5:]
    found = bit_sum(values)
    assert found.dtype == torch.int64 and found.shape == ()
    assert found == sum(values.contiguous().view(bits).flatten().tolist())


def test_a_zero_product_leaves_every_bit_of_a_bfloat16_weight():
    a, b = factors(0.0)
    assert torch.equal(add_products(base(), whole(), {0: (adapter(), (a, b))}).view(torch.int16), base().view(torch.int16))


def test_other_types_are_rounded_to_the_nearest():
    a, b = factors(1e-3)
    exact = base().half().double() + 0.7 * b.double() @ a.double()
    found = add_products(base().half(), whole(), {0: (adapter(), (a, b))})
    torch.testing.assert_close(found, exact.float().half(), atol=0, rtol=0)


def test_rounding_keeps_infinities_and_every_nan():
    """The first and the last are what CUDA makes of an invalid operation, with either sign."""
    bits = torch.tensor([2**31 - 1, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32).repeat(50, 20)
    assert _rounded(bits.view(torch.float32), "q_proj", (0, 0)).isnan().all()
    infinite = torch.tensor([torch.inf, -torch.inf]).repeat(50, 20)
    assert torch.equal(_rounded(infinite.clone(), "q_proj", (0, 0)).float(), infinite)


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-3])
def test_bfloat16_weights_are_neighbours_of_the_sum_and_right_on_average(size):
    """Rounding to the nearest would leave nearly all of the two smaller products out."""
    a, b = factors(size)
    product = 0.7 * b.double() @ a.double()
    exact = base().double() + product
    found = add_products(base(), whole(), {0: (adapter(), (a, b))}).double()
    unit = 2.0 ** (torch.frexp(torch.maximum(exact.abs(), found.abs()))[1].double() - 8)
    assert ((found - exact).abs() <= unit).all()
    gain = (found - base().double()).mul(product).sum() / product.square().sum()
    nearest = (exact.float().bfloat16().double() - base().double()).mul(product).sum() / product.square().sum()
    assert gain == pytest.approx(1.0, abs=0.05)
    assert size == 1e-3 or nearest < 0.5


def test_a_weight_is_the_same_however_it_is_cut():
    a, b = factors(1e-4)
    full = add_products(base(), whole(), {0: (adapter(), (a, b))})
    for begin, size in (((0, 0), (100, COLUMNS)), ((100, 0), (284, COLUMNS)), ((0, 33), (ROWS, 77)), ((71, 600), (2, 40))):
        shard = Shard(size, (Piece(0, begin, (0, 0), size),))
        part = add_products(box(base(), begin, size), shard, {0: (adapter(), (a, b))})
        assert torch.equal(part, box(full, begin, size))


def test_modules_are_rounded_independently():
    a, b = factors(1e-5)
    one, other = (add_products(base(), whole(), {0: (adapter(module=name), (a, b))}) for name in ("up_proj", "gate_proj"))
    assert not torch.equal(one, other)


def test_parts_of_a_shard_without_an_adapter_and_its_base_keep_their_values():
    a, b = factors(1e-2)
    shard = Shard((ROWS + 16, COLUMNS), (Piece(1, (0, 0), (0, 0), (16, COLUMNS)), Piece(0, (0, 0), (16, 0), (ROWS, COLUMNS))))
    values = torch.cat([base()[:16], base()])
    kept = values.clone()
    found = add_products(values, shard, {0: (adapter(), (a, b))})
    assert torch.equal(values, kept) and torch.equal(found[:16], kept[:16])
    assert torch.equal(found[16:], add_products(base(), whole(), {0: (adapter(), (a, b))}))


@pytest.mark.parametrize(
    "changes",
    [
        *({"rank": "8"}, {"rank": 0}, {"rank": None}, {"alpha": "32"}, {"alpha": float("nan")}, {"alpha": -1.0}),
        *({"targets": 5}, {"targets": [5]}, {"expert_rank": -1}, {"expert_rank": "2"}, {"more": 1}),
    ],
)
def test_a_description_of_adapters_is_read_as_it_was_written_and_nothing_else_is(changes):
    written = LowRank(8, 32.0, ("q_proj", "v_proj"), 2)
    assert LowRank.from_json(json.loads(json.dumps(written.as_json()))) == written
    with pytest.raises(ValueError, match="it needs rank"):
        LowRank.from_json({**json.loads(json.dumps(written.as_json())), **changes})


def test_a_rank_above_the_sides_of_a_matrix_is_refused(hf_models):
    arch = read_architecture(hf_models["qwen3_moe"])
    smallest = min(min(one.rows, one.columns) for _, some in LowRank(1, 1.0, expert_rank=0).adapted(arch) for one in some)
    LowRank(smallest, 1.0, expert_rank=0).refuse_missing_targets(arch)
    with pytest.raises(UserError, match=rf"lora.rank={smallest + 1}: model.layers.0.*no rank above {smallest} adds anything"):
        LowRank(smallest + 1, 1.0, expert_rank=0).refuse_missing_targets(arch)
    with pytest.raises(UserError, match=r"lora.expert_rank=2000: model.layers.0.mlp.experts.0.gate_proj is"):
        LowRank(1, 1.0, expert_rank=2000).refuse_missing_targets(arch)
