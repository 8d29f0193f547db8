"""Gradients of tokens that are almost certain, in bf16: g (1 - p), where 1 - p is below the resolution of bf16 at 1."""

from __future__ import annotations

import pytest
import torch

from etr_megatron.vocab_parallel import VocabShard, torch_rows, vocab_parallel_logprob, vocab_parallel_loss

REST = [1e-1, 3e-2, 4e-3, 2e-3, 1e-3, 3e-4, 1e-4]
"""Approximate 1 - p of the rows' targets, as logits are rounded to bf16."""
VOCAB = 40
BF16 = 2.0**-8
UPSTREAM = {"logp": (0.7, 0.0), "logp_and_entropy": (0.7, -0.3), "entropy": (0.0, 0.4)}


def confident() -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 logits [rows, V] whose targets have logit 0 and log-probs of almost 0, and those targets."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.tensor(REST)
    logits = (rest / (1 - rest) / (VOCAB - 1)).log()[:, None] + 0.5 * torch.randn(len(REST), VOCAB, generator=generator)
    targets = torch.randint(0, VOCAB, (len(REST),), generator=generator)
    return logits.scatter_(1, targets[:, None], 0.0).to(torch.bfloat16), targets


def answer(logits: torch.Tensor, targets: torch.Tensor, g_logp: float, g_entropy: float) -> torch.Tensor:
    """float64 [rows, V]: d (g_logp logp + g_entropy H) / d logits by autograd."""
    x = logits.double().requires_grad_()
    log_p = torch.log_softmax(x, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    (g_logp * log_p.gather(1, targets[:, None])[:, 0] + g_entropy * entropy).sum().backward()
    return x.grad


def assert_rounded_once(found: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor) -> None:
    """Every entry is correct to bf16 rounding, and rows sum to 0 within that."""
    at = targets[:, None]
    torch.testing.assert_close(found.double().gather(1, at), wanted.gather(1, at), rtol=1.05 * BF16, atol=1e-8)
    torch.testing.assert_close(found.double(), wanted, rtol=1.05 * BF16, atol=1e-7)
    assert (found.double().sum(1).abs() <= BF16 * wanted.abs().sum(1)).all()


@pytest.mark.parametrize(("g_logp", "g_entropy"), UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("way", ["single_pass", "recompute"])
def test_the_targets_entry_is_rounded_once(way: str, g_logp: float, g_entropy: float) -> None:
    logits, targets = confident()
    # With the identity as the head, hidden states equal the logits exactly, and so do the gradients of both.
    hidden, weight = logits.clone().requires_grad_(), torch.eye(VOCAB, dtype=torch.bfloat16).requires_grad_()
    options = {"shard": VocabShard(VOCAB, VOCAB), "chunk_rows": 3, "backend": "torch"}

    def token_loss(rows: slice, logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return (g_logp * logp + g_entropy * entropy).sum() if g_entropy else (g_logp * logp).sum()

    if way == "single_pass":
        weight.main_grad = torch.zeros(weight.shape)
        loss, *_ = vocab_parallel_loss(hidden, weight, targets, token_loss, **options)
    else:
        loss = token_loss(slice(None), *vocab_parallel_logprob(hidden, weight, targets, **options))
    loss.backward()
    assert_rounded_once(hidden.grad, answer(logits, targets, g_logp, g_entropy), targets)


@pytest.mark.parametrize(("g_logp", "g_entropy"), UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("cut", [1, 17])
def test_of_two_shards_only_the_targets_own_has_its_entry(cut: int, g_logp: float, g_entropy: float) -> None:
    logits, targets = confident()
    log_p = torch.log_softmax(logits.double(), 1)
    log_sum, entropy = torch.logsumexp(logits.double(), 1), -(log_p.exp() * log_p).sum(1)
    upstream = torch.full((len(targets),), g_logp), torch.full((len(targets),), g_entropy) if g_entropy else None
    parts = []
    for begin, end in ((0, cut), (cut, VOCAB)):
        own = (targets >= begin) & (targets < end)
        columns = torch.where(own, targets - begin, -1)
        part = logits[:, begin:end].float()
        out = torch.empty(part.shape, dtype=torch.bfloat16)
        parts.append(torch_rows.row_gradient(part, columns, log_sum.float(), entropy.float(), *upstream, out))
    assert_rounded_once(torch.cat(parts, 1), answer(logits, targets, g_logp, g_entropy), targets)
