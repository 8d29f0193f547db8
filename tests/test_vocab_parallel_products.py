"""How many matrix products and messages the head takes, and which of them wait for which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from etr_megatron.vocab_parallel import VocabShard, gemm, vocab_parallel_logprob, vocab_parallel_loss
from tests.vocab_cases import loss_case
from tests.vocab_jobs import pieces


class CountsProducts(TorchDispatchMode):
    """multiplications: of all matrix products, however they are divided. names: of the operators called. shapes: of the
    operands of oneDNN's products, with strides of the right ones. dense: whether all right ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications, self.names, self.shapes, self.dense = 0, set(), set(), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        assert name not in ("bmm", "baddbmm", "matmul", "linear", "einsum"), name
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
            self.names.add(name)
        if name == "_linear_pointwise":
            left, right = args[:2]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[0]
            self.names.add(name)
            self.shapes.add((left.shape, right.shape, right.stride()))
            self.dense &= right.is_contiguous() or right.t().is_contiguous()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("small_pieces", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [32, None])
@pytest.mark.parametrize(("way", "products"), [("single_pass", 3), ("recompute", 4), ("without_gradients", 1)])
def test_products_of_each_way_through_the_head(
    way: str, products: int, chunk_rows: int | None, dtype: torch.dtype, small_pieces: bool
) -> None:
    rows, width, vocab = 64, 2048, 700  # wide enough that products are computed by blocks of the weight
    case = loss_case(rows, width, vocab, dtype=dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    if way != "recompute":
        weight.main_grad = torch.zeros(weight.shape)
    options = {"shard": VocabShard(vocab, vocab), "temperature": case.temperature, "chunk_rows": chunk_rows}
    with pieces(small_pieces), CountsProducts() as counted:
        if way == "without_gradients":
            with torch.no_grad():
                vocab_parallel_logprob(hidden, weight, case.targets, **options)
        else:
            vocab_parallel_loss(hidden, weight, case.targets, case.token_loss, **options)[0].backward()
    assert counted.multiplications == products * rows * width * vocab
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        assert counted.names == {"_linear_pointwise"}  # oneDNN's, which take half the time of the others
    if dtype == torch.bfloat16:
        assert "_linear_pointwise" not in counted.names  # on an older CPU it refuses bf16


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@needs_onednn
def test_chunks_of_many_sizes_are_products_of_few_shapes() -> None:
    """oneDNN compiles, and keeps, half a megabyte of code per shape."""
    case = loss_case(96, 24, 131)
    with CountsProducts() as counted:
        for rows in range(1, 97):
            states, weight = case.hidden[:rows].clone().requires_grad_(), case.weight.clone().requires_grad_()
            weight.main_grad = torch.zeros(weight.shape)
            shard = VocabShard(131, 131)
            vocab_parallel_loss(states, weight, case.targets[:rows], lambda _, logp, __: logp.sum(), shard=shard)[0].backward()
    assert len(counted.shapes) == 3 * 3  # three products, for 32, 64 and 96 rows


@needs_onednn
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_operands_with_gaps_between_their_elements_are_given_to_onednn_without(which: str) -> None:
    """oneDNN multiplies operands with gaps element by element, hundreds of times slower."""
    shapes = {"hidden": (32, 24), "weight": (131, 24)}
    operands = {name: torch.ones(shape) for name, shape in shapes.items()}
    operands[which] = torch.ones(shapes[which][0], 48)[:, :24]
    with CountsProducts() as counted:
        logits = gemm.logits_into(torch.empty(32, 131), **operands, scale=1.0)
        gemm.add_gradients(torch.zeros(32, 24), torch.zeros(131, 24), logits, **operands)
    assert counted.names == {"_linear_pointwise"} and counted.dense


def test_shards_exchange_sixteen_bytes_a_row_once_a_chunk_and_where_asked_behind_the_next_chunks_product(gangs) -> None:
    case = loss_case(9, 24, 301)  # three chunks of three rows
    orders = {
        False: ["logits", "gather 48", "wait"] * 3,
        True: ["logits", "gather 48", *["logits", "gather 48", "wait"] * 2, "wait"],
    }
    for overlap, wanted in orders.items():
        for found in gangs(2).run("tests.vocab_jobs:events_of_the_chunks", case=case, overlap=overlap):
            assert found == wanted
