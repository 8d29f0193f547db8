"""The single-pass loss: values and gradients against float64, where gradients go."""

from __future__ import annotations

import itertools

import pytest
import torch

from etr_megatron.vocab_parallel import (
    VocabShard,
    gemm,
    head_chunks,
    torch_rows,
    vocab_parallel_logprob,
    vocab_parallel_loss,
)
from tests.vocab_cases import loss_case
from tests.vocab_jobs import pieces


def with_main_grad(weight: torch.Tensor, padding: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight as a parameter with Megatron's buffer; its last `padding` rows are garbage."""
    garbage = torch.full((padding, weight.shape[1]), torch.nan, dtype=weight.dtype)
    weight = torch.cat([weight, garbage]).requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, dtype=dtype)
    weight.grad_added_to_main_grad = False
    return weight


@pytest.fixture(params=["default", "small_pieces", "without_onednn"])
def products(request, monkeypatch):
    """How the CPU computes the products: a vocabulary of these tests is one block, except with `small_pieces`."""
    if request.param == "without_onednn":
        monkeypatch.setattr(gemm, "_ONEDNN", False)
    with pieces(request.param == "small_pieces"):
        yield


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize(("rows", "hidden", "vocab"), [(1, 5, 3), (11, 7, 131), (6, 33, 1009)])
def test_values_and_gradients_equal_float64_autograd(rows, hidden, vocab, chunk_rows):
    case = loss_case(rows, hidden, vocab, seed=rows)
    wanted = case.answer()
    states, weight = case.hidden.requires_grad_(), with_main_grad(case.weight, padding=13)
    weight.main_grad.fill_(2.5)  # from an earlier microbatch
    loss, logp, entropy = vocab_parallel_loss(
        states,
        weight,
        case.targets,
        case.token_loss,
        shard=VocabShard(vocab + 13, vocab),
        temperature=case.temperature,
        chunk_rows=chunk_rows,
    )
    loss.backward()
    added = weight.main_grad - 2.5
    assert not added[vocab:].any()
    found = {"loss": loss, "logp": logp, "entropy": entropy, "hidden_grad": states.grad, "weight_grad": added[:vocab]}
    for name, value in found.items():
        torch.testing.assert_close(
            value.detach().double(), wanted[name], atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_at_the_edges_of_a_group_of_columns_count_once(monkeypatch, dtype):
    case = loss_case(6, 12, 111, dtype=dtype)
    case.targets = torch.tensor([0, 36, 37, 73, 74, 110])
    case.token_loss = lambda _, logp, __: (logp * torch.arange(1.0, 7.0)).sum()
    found = []
    for columns in (111, 37):
        monkeypatch.setattr(head_chunks, "_COLUMNS", columns)
        weight = with_main_grad(case.weight)
        run(case, weight)[0].backward()
        found.append(weight.main_grad)
    torch.testing.assert_close(*found, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-5)


@pytest.mark.parametrize("small_pieces", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("vocab", [301, 130])  # on 4 ranks of 128 rows, 130 leaves two shards without any real row
def test_sharded_vocabulary_equals_the_whole(gangs, world, vocab, overlap, small_pieces):
    case = loss_case(10, 24, vocab)
    wanted = case.answer()
    options = {"already": 1.5, "overlap": overlap, "small_pieces": small_pieces}
    replies = gangs(world).run("tests.vocab_jobs:single_pass", case=case, **options)
    weight_grad = torch.cat([reply["weight_grad"] for reply in replies])
    assert not weight_grad[vocab:].any()
    torch.testing.assert_close(weight_grad[:vocab].double(), wanted["weight_grad"], atol=2e-5, rtol=1e-5)
    for reply in replies:
        for name in ("loss", "logp", "entropy", "hidden_grad"):
            torch.testing.assert_close(reply[name].double(), wanted[name], atol=2e-5, rtol=1e-5)
        assert torch.equal(reply["logp"], replies[0]["logp"])  # bit for bit on every rank, so all take the same decisions


def run(case, weight, *, scale: float = 1.0, chunk_rows: int | None = None):
    states = case.hidden.clone().requires_grad_()
    loss, logp, entropy = vocab_parallel_loss(
        states,
        weight,
        case.targets,
        case.token_loss,
        shard=VocabShard(*weight.shape[:1], len(case.weight)),
        temperature=case.temperature,
        backward_scale=scale,
        chunk_rows=chunk_rows,
    )
    assert not (logp.requires_grad or entropy.requires_grad)  # detached: a gradient through them would count twice
    return loss, logp, states


@pytest.mark.parametrize("scale", [16.0, 0.1])  # 0.1 is rounded in fp32
def test_the_backward_scale_is_part_of_every_gradient(scale):
    case = loss_case(7, 12, 50)
    wanted = case.answer()
    weight = with_main_grad(case.weight)
    loss, _, states = run(case, weight, scale=scale)
    (loss * scale).backward()
    torch.testing.assert_close(states.grad.double(), scale * wanted["hidden_grad"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(weight.main_grad.double(), scale * wanted["weight_grad"], atol=1e-4, rtol=1e-5)


def test_another_gradient_than_the_backward_scale_is_refused():
    case = loss_case(7, 12, 50)
    loss, _, _ = run(case, with_main_grad(case.weight), scale=16.0)
    with pytest.raises(RuntimeError, match=r"1\.0 instead of 16\.0"):
        loss.backward()


def test_a_second_backward_is_refused():
    case = loss_case(7, 12, 50)
    loss, _, _ = run(case, with_main_grad(case.weight))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward twice"):
        loss.backward()


def test_autograd_gets_zeros_and_the_mark_that_tells_megatron_not_to_add():
    case = loss_case(7, 12, 50)
    weight = with_main_grad(case.weight)
    loss, _, _ = run(case, weight)
    assert not weight.grad_added_to_main_grad
    loss.backward()
    assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape and weight.grad._nnz() == 0


def test_a_tied_embeddings_own_gradient_is_left_for_megatrons_hook():
    case = loss_case(7, 12, 50)
    weight = with_main_grad(case.weight)
    weight.zero_out_wgrad = True
    loss, _, _ = run(case, weight)
    (loss + 2 * weight[3].sum()).backward()
    assert weight.grad[3].eq(2).all() and weight.grad.sum() == 24


def test_without_gradients_the_buffer_stays_untouched():
    case = loss_case(7, 12, 50)
    weight = with_main_grad(case.weight)
    with torch.no_grad():
        loss, _, _ = run(case, weight)
    frozen = with_main_grad(case.weight.detach()).requires_grad_(False)
    through_frozen, _, states = run(case, frozen)
    through_frozen.backward()
    torch.testing.assert_close(loss.double(), case.answer()["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states.grad.double(), case.answer()["hidden_grad"], atol=2e-5, rtol=1e-5)
    assert not weight.main_grad.any() and not weight.grad_added_to_main_grad and not frozen.main_grad.any()


def test_without_a_buffer_the_gradient_takes_autograds_way():
    case = loss_case(7, 12, 50)
    weight = case.weight.clone().requires_grad_()
    loss, _, states = run(case, weight)
    (3 * loss).backward()  # any scale works, as no gradient was formed in forward
    wanted = case.answer()
    torch.testing.assert_close(weight.grad.double(), 3 * wanted["weight_grad"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(states.grad.double(), 3 * wanted["hidden_grad"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["single_pass", "recompute"])
def test_a_bf16_buffer_gets_the_sum_over_all_chunks_rounded_once(way):
    case, chunks = loss_case(7, 12, 50), []
    wanted, token_loss = case.answer(), case.token_loss
    case.token_loss = lambda rows, *values: chunks.append(rows) or token_loss(rows, *values)
    weight = with_main_grad(case.weight, dtype=torch.bfloat16)
    weight.main_grad.fill_(0.375)  # from an earlier microbatch
    if way == "single_pass":
        loss, _, states = run(case, weight, chunk_rows=3)
        assert len(chunks) == 3 and weight.main_grad.ne(0.375).any()  # formed in forward
    else:
        states = case.hidden.requires_grad_()
        options = dict(shard=VocabShard(50, 50), temperature=case.temperature, chunk_rows=3)
        loss = token_loss(slice(0, 7), *vocab_parallel_logprob(states, weight, case.targets, **options))
    loss.backward()
    assert weight.grad_added_to_main_grad and weight.grad._nnz() == 0
    torch.testing.assert_close(states.grad.double(), wanted["hidden_grad"], atol=2e-5, rtol=1e-5)
    exact = 0.375 + wanted["weight_grad"]
    torch.testing.assert_close(weight.main_grad.double(), exact, atol=2e-5, rtol=2**-8)  # half a unit of bf16's last place
    assert (weight.main_grad == exact.bfloat16()).double().mean() > 0.95


@pytest.mark.parametrize("loss", ["entropy", "nothing"])
def test_what_a_loss_does_not_depend_on_has_no_part_in_the_gradient(loss):
    case = loss_case(7, 12, 50)

    def token_loss(rows, logp, entropy):
        return (0.3 * entropy**2).sum() if loss == "entropy" else torch.tensor(0.5)

    case.token_loss = token_loss
    weight = with_main_grad(case.weight)
    found, _, states = run(case, weight, chunk_rows=3)
    found.backward()
    if loss == "nothing":
        assert found.item() == 1.5 and not weight.main_grad.any() and not states.grad.any()  # the sum over three chunks
        return
    wanted = case.answer()
    torch.testing.assert_close(states.grad.double(), wanted["hidden_grad"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(weight.main_grad.double(), wanted["weight_grad"], atol=2e-5, rtol=1e-5)


def test_garbage_in_rows_without_a_loss_changes_nothing():
    case = loss_case(7, 12, 50)
    wanted = case.answer()
    rows = torch.tensor([0, 3, 4, 8, 9, 13, 14])
    everything = torch.full((16, 12), torch.nan).index_copy(0, rows, case.hidden).requires_grad_()
    weight = with_main_grad(case.weight, padding=6)
    loss, _, _ = vocab_parallel_loss(
        everything.index_select(0, rows),
        weight,
        case.targets,
        case.token_loss,
        shard=VocabShard(56, 50),
        temperature=case.temperature,
    )
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), wanted["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(everything.grad[rows].double(), wanted["hidden_grad"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(weight.main_grad[:50].double(), wanted["weight_grad"], atol=2e-5, rtol=1e-5)
    masked = torch.ones(16, dtype=torch.bool).index_fill(0, rows, False)
    assert not everything.grad[masked].any() and not weight.main_grad[50:].any()


def test_no_rows_give_a_zero_loss_that_still_goes_backward():
    case = loss_case(1, 12, 50)
    case.hidden, case.targets = case.hidden[:0], case.targets[:0]
    weight = with_main_grad(case.weight)
    loss, logp, states = run(case, weight)
    loss.backward()
    assert loss.item() == 0 and logp.shape == (0,) and states.grad.shape == (0, 12)
    assert weight.grad_added_to_main_grad and not weight.main_grad.any() and weight.grad._nnz() == 0


def test_bf16_gradients_are_summed_in_fp32_over_many_chunks():
    case = loss_case(512, 16, 40, dtype=torch.bfloat16)
    sums = []
    for chunk_rows in (512, 2):
        weight = with_main_grad(case.weight)
        loss, _, states = run(case, weight, chunk_rows=chunk_rows)
        loss.backward()
        assert states.grad.dtype == torch.bfloat16 and weight.main_grad.dtype == torch.float32
        sums.append(weight.main_grad.double())
    wanted = case.answer()["weight_grad"]
    # Both have the logits' own rounding to bf16. A sum kept in bf16 would lose 2^-9 of its size in each of 256 additions.
    assert (sums[0] - wanted).norm() < 0.1 * wanted.norm()
    assert (sums[1] - sums[0]).norm() < 0.005 * wanted.norm()


@pytest.mark.parametrize("way", ["single_pass", "recompute"])
def test_bf16_gradients_of_hidden_states_are_summed_in_fp32_over_many_groups_of_columns(monkeypatch, way):
    case = loss_case(64, 48, 2000, dtype=torch.bfloat16)
    found = []
    for columns in (2000, 8):
        monkeypatch.setattr(head_chunks, "_COLUMNS", columns)
        weight = with_main_grad(case.weight) if way == "single_pass" else case.weight.clone().requires_grad_()
        loss, _, states = run(case, weight)
        loss.backward()
        found.append(states.grad.double())
    # The product and the sum are each rounded once. A sum kept in bf16 would lose 2^-9 of its size in each of 250 additions.
    assert 0 < (found[1] - found[0]).norm() < 0.005 * found[0].norm()


@pytest.mark.parametrize("offset", [1e3, -1e3])
@pytest.mark.parametrize("shards", [(0, 131), (0, 60, 131), (0, 60, 131, 131)], ids=["one", "two", "one_of_padding"])
def test_a_common_offset_of_the_logits_costs_no_digits(shards, offset):
    logits = offset + 3 * torch.randn(7, 131, generator=torch.Generator().manual_seed(0))
    columns = torch.arange(7)
    statistics = []
    for begin, end in itertools.pairwise(shards):
        part = logits[:, begin:end]
        statistics.append(
            head_chunks._statistics(head_chunks.HeadConfig(VocabShard(131, 131)), part, columns if begin == 0 else columns - 9)
        )
    logp, entropy, log_sum = head_chunks._combine(torch.stack(statistics))
    log_p = torch.log_softmax(logits.double(), 1)
    torch.testing.assert_close(logp.double(), log_p.gather(1, columns[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(1), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(log_sum.double(), torch.logsumexp(logits.double(), 1), atol=0, rtol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_stays_visible_in_its_row_alone(bad):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    logits[1, 20] = bad
    found = torch_rows.row_statistics(logits, torch.tensor([0, 20, -1]))
    assert found.isnan().any(0).tolist() == [False, True, False]
