"""The input of every contestant of the log-prob benchmark: tensors, a loss over them, and a buffer for the weight gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron.vocab_parallel import VocabShard

_CLIP = 0.2
_ENTROPY_BONUS = 0.01
_LOG_RATIOS = torch.tensor([-0.4, -0.1, 0.1, 0.4])
"""Log-ratios to the old policy: far beyond a bound (log 0.8 = -0.22, log 1.2 = 0.18) or well within, so that rounding never
decides on which side of a bound a token lies."""


@dataclass(frozen=True)
class Problem:
    """Loss rows of one microbatch and one vocabulary shard.

    hidden: [T, H] leaf, the same on every rank. weight: [V/TP, H] leaf with `main_grad`, fp32 [V/TP, H], to which a contestant
    adds its weight gradient. targets: int64 [T]. old_logp, advantages: fp32 [T]. scratch: buffers that the bare products keep
    between calls, by the contestant's name: logits of a chunk, and the gradient of hidden.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logp: Tensor
    advantages: Tensor
    shard: VocabShard
    entropy_bonus: float = _ENTROPY_BONUS
    scratch: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def token_loss(self, rows: slice, logp: Tensor, entropy: Tensor | None) -> Tensor:
        """Clipped surrogate with entropy bonus of some rows, summed and divided by the T of the whole problem."""
        ratio, advantage = (logp - self.old_logp[rows]).exp(), self.advantages[rows]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - _CLIP, 1 + _CLIP) * advantage).sum()
        bonus = 0.0 if entropy is None else self.entropy_bonus * entropy.sum()
        return -(surrogate + bonus) / len(self.targets)

    def forget_gradients(self) -> None:
        """Reset gradients before a pass, as `optimizer.zero_grad` does; `main_grad` keeps accumulating."""
        self.hidden.grad = self.weight.grad = None
        self.weight.grad_added_to_main_grad = False

    def collect_weight_gradient(self) -> None:
        """Like Megatron's DDP hook after backward: add a gradient to `main_grad` if it is not there yet."""
        if self.weight.grad is not None and not self.weight.grad_added_to_main_grad:
            self.weight.main_grad.add_(self.weight.grad)
        self.weight.grad = None


def make_problem(rows: int, hidden: int, vocab: int, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Problem:
    """Random inputs: logits of standard deviation 2, uniform targets, every page written to."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2 + rank)
    shard = VocabShard(vocab // ranks, vocab, group)
    weight = torch.randn(shard.size, hidden, dtype=dtype, generator=own).mul_(2 / hidden**0.5).requires_grad_()
    weight.main_grad = torch.empty(shard.size, hidden).fill_(0)  # torch.zeros would not map its pages before a write
    states = torch.randn(rows, hidden, dtype=dtype, generator=shared)
    targets = torch.randint(0, vocab, (rows,), generator=shared)
    noise = _LOG_RATIOS[torch.randint(0, len(_LOG_RATIOS), (rows,), generator=shared)]
    advantages = torch.randn(rows, generator=shared)
    old_logp = _logprobs(states, weight.detach(), targets, shard) - noise
    return Problem(states.requires_grad_(), weight, targets, old_logp, advantages, shard)


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard) -> Tensor:
    """fp32 [T], 32 rows at a time; independent of all contestants."""
    found = torch.empty(2, len(hidden))
    for begin in range(0, len(hidden), 32):
        rows = slice(begin, begin + 32)
        logits = (hidden[rows] @ weight.t()).float()
        column = targets[rows] - shard.start
        here = (column >= 0) & (column < shard.size)
        found[0, rows] = logits.gather(1, column.clamp(0, shard.size - 1)[:, None])[:, 0] * here
        found[1, rows] = logits.logsumexp(1)
    if shard.group is None:
        return found[0] - found[1]
    parts = [torch.empty_like(found) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, found, group=shard.group)
    target, log_sum = torch.stack(parts, 1)
    return target.sum(0) - log_sum.logsumexp(0)
