"""The head's matrix products on CPU, bit for bit, for any blocks and any memory layout of the operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from etr_megatron.vocab_parallel import gemm
from etr_megatron.vocab_parallel.weight_grad import weight_grad

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows_adjacent": torch.clone,
    "columns_adjacent": lambda x: x.t().contiguous().t(),
    "part_of_wider_rows": lambda x: torch.cat([torch.full_like(x, 9.0), x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every_other_column": lambda x: torch.stack([x, x + 1], 2).flatten(1)[:, ::2],
    "every_other_row": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "one_row_for_all": lambda x: x[:1].expand(x.shape),
    "from_an_odd_address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.fixture(params=["onednn", "torch"], autouse=True)
def library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(gemm, "_ONEDNN", False)


@pytest.fixture(params=[1 << 20, 240], ids=["one_block", "small_blocks"])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(gemm, "_BLOCK_BYTES", request.param)


def whole(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """-1, 0 and 1: their products are exact in every dtype, in any order."""
    generator = torch.Generator().manual_seed(100 * rows + columns)
    return torch.randint(-1, 2, (rows, columns), generator=generator).to(dtype)


SIZES = [(1, 5, 3), (7, 12, 131), (4, 1, 50), (5, 33, 1), (1, 1, 1)]
"""(rows, H, columns)."""

LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def operands(dtype: torch.dtype, layout: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states [rows, H] and weight [columns, H] of all sizes."""
    for rows, hidden, columns in SIZES:
        yield LAYOUTS[layout](whole(rows, hidden, dtype)), LAYOUTS[layout](whole(columns, hidden, dtype))


@pytest.mark.usefixtures("block_bytes")
@LAYOUT
@DTYPE
def test_logits_are_the_scaled_product(dtype, layout):
    for states, weight in operands(dtype, layout):
        out = torch.full((len(states), len(weight) + 2), torch.nan)
        for scale in (1.0, 0.5):
            found = gemm.logits_into(out[:, 1:-1], states, weight, scale)
            assert torch.equal(found, scale * (states.float() @ weight.float().t())), (states.shape, weight.shape, scale)
            assert found.data_ptr() == out[:, 1:].data_ptr() and out[:, [0, -1]].isnan().all()


@pytest.mark.usefixtures("block_bytes")
@LAYOUT
@DTYPE
def test_both_gradients_are_added_to_what_is_there(dtype, layout):
    for states, weight in operands(dtype, layout):
        (rows, hidden), columns = states.shape, len(weight)
        grad = torch.nn.functional.pad(whole(rows, columns, dtype), (1, 1), value=torch.nan)[:, 1:-1]  # a group of columns
        before = grad.clone()
        for total in (torch.full((columns, hidden), -1.5), None):
            grad_hidden = torch.full((rows, hidden), 2.5)
            gemm.add_gradients(grad_hidden, total, grad, states, weight)
            assert torch.equal(grad_hidden, 2.5 + grad.float() @ weight.float()), (rows, hidden, columns)
            assert total is None or torch.equal(total, -1.5 + grad.float().t() @ states.float()), (rows, hidden, columns)
        assert torch.equal(grad, before)


def test_in_bf16_the_hidden_states_gradient_is_rounded_once_whatever_the_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    grad, weight = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in ((5, 400), (400, 12)))
    found = []
    for rows in (1024, 10):
        monkeypatch.setattr(gemm, "_BLOCK_ROWS", rows)
        found.append(torch.zeros(5, 12))
        gemm.add_gradients(found[-1], None, grad, torch.zeros(5, 12, dtype=torch.bfloat16), weight)
    assert torch.equal(found[1], found[0]) and torch.equal(found[0], found[0].to(torch.bfloat16).float())


def test_no_columns_leave_everything_as_it_is():
    none, states, grad_hidden = torch.zeros(0, 4), torch.ones(3, 4), torch.ones(3, 4)
    assert gemm.logits_into(torch.empty(3, 0), states, none, 0.5).shape == (3, 0)
    gemm.add_gradients(grad_hidden, torch.zeros(0, 4), torch.zeros(3, 0), states, none)
    assert grad_hidden.eq(1).all()


def test_blocks_are_limited_in_bytes_and_in_rows():
    assert [gemm.block_rows(hidden, 4) for hidden in (8, 256, 512, 1024, 1 << 20)] == [1024, 1024, 512, 256, 1]
    assert gemm.block_rows(1024, 2) == 512


def test_a_bf16_weights_gradient_without_a_buffer_is_summed_in_fp32_and_handed_on_in_bf16():
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    grad = weight_grad(weight)
    for _ in range(300):  # a sum in bf16 would stop at 256
        gemm.add_gradients(
            torch.zeros(1, 4), grad.total, torch.ones_like(weight[:, :1].t()), torch.ones_like(weight[:1]), weight
        )
    assert grad.autograd_grad().equal(torch.full((3, 4), 300, dtype=torch.bfloat16))


def test_without_onednn_in_torch_it_is_not_called(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not gemm._has_onednn()
