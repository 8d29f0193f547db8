"""How many matrix products and messages the head takes, and which wait for which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from etr_megatron.vocab_parallel import VocabShard, vocab_parallel_logprob, vocab_parallel_loss
from tests.vocab_cases import loss_case


class CountsProducts(TorchDispatchMode):
    """multiplications: of all matrix products, in whatever pieces they come."""

    multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        assert name not in ("bmm", "baddbmm", "matmul", "linear", "einsum"), name
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        if name == "_linear_pointwise":
            left, right = args[:2]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [3, None])
@pytest.mark.parametrize(("way", "products"), [("single_pass", 3), ("recompute", 4), ("without_gradients", 1)])
def test_products_of_each_way_through_the_head(way: str, products: int, chunk_rows: int | None, dtype: torch.dtype) -> None:
    rows, width, vocab = 7, 2048, 700  # wide enough for products to come in blocks of the weight
    case = loss_case(rows, width, vocab, dtype=dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    if way != "recompute":
        weight.main_grad = torch.zeros(weight.shape)
    options = {"shard": VocabShard(vocab, vocab), "temperature": case.temperature, "chunk_rows": chunk_rows}
    with CountsProducts() as counted:
        if way == "without_gradients":
            with torch.no_grad():
                vocab_parallel_logprob(hidden, weight, case.targets, **options)
        else:
            vocab_parallel_loss(hidden, weight, case.targets, case.token_loss, **options)[0].backward()
    assert counted.multiplications == products * rows * width * vocab


def test_shards_exchange_sixteen_bytes_a_row_once_a_chunk_and_where_asked_behind_the_next_chunks_product(gangs) -> None:
    case = loss_case(9, 24, 301)  # three chunks of three rows
    orders = {
        False: ["logits", "gather 48", "wait"] * 3,
        True: ["logits", "gather 48", *["logits", "gather 48", "wait"] * 2, "wait"],
    }
    for overlap, wanted in orders.items():
        for found in gangs(2).run("tests.vocab_jobs:events_of_the_chunks", case=case, overlap=overlap):
            assert found == wanted
