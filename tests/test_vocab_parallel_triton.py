"""The whole head with the Triton row passes, in Triton's interpreter, against float64."""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import pytest
import torch

from etr_megatron.vocab_parallel import VocabShard, vocab_parallel_logprob, vocab_parallel_loss
from tests.gang import Gang
from tests.vocab_cases import Case, loss_case
from tests.vocab_jobs import pieces

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")


@pytest.fixture(scope="module")
def interpreted():
    """Two ranks whose triton interprets, which must be selected before its import."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        gang = Gang(2)
    yield gang
    gang.stop()


def one_rank(case: Case, single_pass: bool, small_pieces: bool) -> dict[str, torch.Tensor]:
    """Values and gradients of the whole vocabulary on one rank, by either variant of the head."""
    with pieces(small_pieces):
        return values_and_gradients(case, single_pass)


def values_and_gradients(case: Case, single_pass: bool) -> dict[str, torch.Tensor]:
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    options = {
        "shard": VocabShard(len(weight), len(weight)),
        "temperature": case.temperature,
        "chunk_rows": 4,
        "backend": "triton",
    }
    if single_pass:
        loss, logp, entropy = vocab_parallel_loss(hidden, weight, case.targets, case.token_loss, **options)
    else:
        logp, entropy = vocab_parallel_logprob(hidden, weight, case.targets, **options)
        loss = case.token_loss(slice(None), logp, entropy)
    loss.backward()
    found = {"loss": loss, "logp": logp, "entropy": entropy, "hidden_grad": hidden.grad, "weight_grad": weight.main_grad}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("single_pass", [True, False], ids=["single_pass", "recompute"])
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance", "small_pieces"),
    [
        ((7, 12, 131), torch.float32, 2e-5, False),
        ((7, 12, 131), torch.bfloat16, 6e-2, False),
        ((1, 129, 4099), torch.float32, 2e-5, False),
        ((7, 12, 131), torch.float32, 2e-5, True),
        ((7, 12, 131), torch.bfloat16, 6e-2, True),
    ],
    ids=["fp32", "bf16", "one_row_two_tiles_fp32", "groups_of_columns_fp32", "groups_of_columns_bf16"],
)
def test_values_and_gradients_equal_float64_autograd(interpreted, single_pass, size, dtype, tolerance, small_pieces):
    case = loss_case(*size, dtype=dtype)
    job = {"case": case, "single_pass": single_pass, "small_pieces": small_pieces}
    found = interpreted.run("tests.test_vocab_parallel_triton:one_rank", **job)[0]
    for name, wanted in case.answer().items():
        torch.testing.assert_close(
            found[name].double(), wanted, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("overlap", [False, True])
def test_sharded_vocabulary_equals_the_whole(interpreted, overlap):
    case = loss_case(10, 24, 301)
    wanted = case.answer()
    replies = interpreted.run("tests.vocab_jobs:single_pass", case=case, already=1.5, overlap=overlap, backend="triton")
    weight_grad = torch.cat([reply["weight_grad"] for reply in replies])[:301]
    torch.testing.assert_close(weight_grad.double(), wanted["weight_grad"], atol=2e-5, rtol=1e-5)
    for reply in replies:
        for name in ("loss", "logp", "entropy", "hidden_grad"):
            torch.testing.assert_close(reply[name].double(), wanted[name], atol=2e-5, rtol=1e-5)
