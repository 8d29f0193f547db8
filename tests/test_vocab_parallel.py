"""Log-prob and entropy from vocabulary shards against a float64 log_softmax over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch

from etr_megatron.vocab_parallel import VocabShard, vocab_parallel_logprob
from tests.vocab_jobs import pieces


def case(rows: int, hidden: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, hidden, generator=generator).to(dtype),
        (0.5 * torch.randn(vocab, hidden, generator=generator)).to(dtype),
        torch.randint(0, vocab, (rows,), generator=generator),
        torch.randn(2, rows, generator=generator),
    )


def reference(hidden, weight, targets, upstream, temperature):
    """Float64 values and gradients by autograd over plain log_softmax."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    logp = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (upstream[0].double() * logp + upstream[1].double() * entropy).sum().backward()
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("small_pieces", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize(("rows", "hidden", "vocab"), [(1, 5, 3), (11, 7, 131), (6, 33, 1009)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_float64_log_softmax(rows, hidden, vocab, temperature, chunk_rows, small_pieces):
    h, w, targets, upstream = case(rows, hidden, vocab)
    wanted = reference(h, w, targets, upstream, temperature)
    h, w = h.requires_grad_(), w.requires_grad_()
    padded = torch.cat([w, torch.full((13, hidden), 3.0)])  # padding must have no effect, whatever it contains
    with pieces(small_pieces):
        logp, entropy = vocab_parallel_logprob(
            h, padded, targets, shard=VocabShard(vocab + 13, vocab), temperature=temperature, chunk_rows=chunk_rows
        )
        (upstream[0] * logp + upstream[1] * entropy).sum().backward()
    for found, expected in zip((logp, entropy, h.grad, w.grad), wanted, strict=True):
        torch.testing.assert_close(found.detach().double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("used", [0, 1], ids=["logp_alone", "entropy_alone"])
def test_a_loss_of_one_of_the_two_has_its_gradient(used):
    h, w, targets, upstream = case(11, 7, 131)
    upstream[1 - used] = 0.0
    wanted = reference(h, w, targets, upstream, 0.6)
    h, w = h.requires_grad_(), w.requires_grad_()
    found = vocab_parallel_logprob(h, w, targets, shard=VocabShard(131, 131), temperature=0.6, chunk_rows=4)
    (upstream[used] * found[used]).sum().backward()
    torch.testing.assert_close(h.grad.double(), wanted[2], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(w.grad.double(), wanted[3], atol=2e-5, rtol=1e-5)


def test_logprobs_are_never_above_zero_at_odd_vocabulary_sizes():
    for vocab in (2, 3, 127, 129, 301):
        h, w, targets, _ = case(9, 6, vocab, seed=vocab)
        logp, entropy = vocab_parallel_logprob(20 * h, w, targets, shard=VocabShard(vocab, vocab))
        assert (logp <= 1e-6).all() and (entropy >= -1e-5).all()


def test_no_rows_give_empty_results_and_zero_gradients():
    h, w, targets, _ = case(0, 4, 9)
    h, w = h.requires_grad_(), w.requires_grad_()
    logp, entropy = vocab_parallel_logprob(h, w, targets, shard=VocabShard(9, 9))
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == (0,) and h.grad.shape == (0, 4) and not w.grad.any()


def test_bfloat16_inputs_give_float32_results_close_to_float64():
    h, w, targets, upstream = case(8, 64, 500, dtype=torch.bfloat16)
    wanted = reference(h, w, targets, upstream, 1.0)
    logp, _ = vocab_parallel_logprob(h, w, targets, shard=VocabShard(500, 500))
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), wanted[0], atol=0.1, rtol=0.02)


def test_shapes_that_do_not_fit_are_refused():
    h, w, targets, _ = case(3, 4, 9)
    with pytest.raises(ValueError, match="do not fit a shard of 10 rows"):
        vocab_parallel_logprob(h, w, targets, shard=VocabShard(10, 9))
    with pytest.raises(ValueError, match=r"torch\.float64.* do not fit"):
        vocab_parallel_logprob(h.double(), w.double(), targets, shard=VocabShard(9, 9))


def test_a_column_of_padding_is_nobodys_target():
    assert VocabShard(16, 10).columns(torch.tensor([0, 9, 10, 15, 16, -1])).tolist() == [0, 9, -1, -1, -1, -1]


@pytest.mark.parametrize("small_pieces", [False, True])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("vocab", [301, 130])  # on 4 ranks of 128 rows, 130 leaves two shards without any real row
def test_sharded_vocabulary_equals_the_whole(gangs, world, vocab, small_pieces):
    h, w, targets, upstream = case(10, 24, vocab)
    wanted = reference(h, w, targets, upstream, 0.7)
    inputs = {"hidden": h, "weight": w, "targets": targets, "upstream": upstream, "temperature": 0.7}
    replies = gangs(world).run("tests.vocab_jobs:sharded", **inputs, small_pieces=small_pieces)
    weight_grad = torch.cat([reply["weight_grad"] for reply in replies])
    assert not weight_grad[vocab:].any()
    torch.testing.assert_close(weight_grad[:vocab].double(), wanted[3], atol=2e-5, rtol=1e-5)
    for reply in replies:
        for name, expected in zip(("logp", "entropy", "hidden_grad"), wanted, strict=False):
            torch.testing.assert_close(reply[name].double(), expected, atol=2e-5, rtol=1e-5)
