"""Problems for the vocabulary tests and their answers in float64, independent of the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """hidden [R, H], weight [V, H], targets [R]; old log-probs and advantages [R] of a clipped loss with an entropy bonus."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logp: Tensor
    advantage: Tensor
    temperature: float

    def token_loss(self, rows: slice, logp: Tensor, entropy: Tensor) -> Tensor:
        ratio = (logp - self.old_logp[rows].to(logp.dtype)).exp()
        advantage = self.advantage[rows].to(logp.dtype)
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        return -(surrogate + 0.1 * entropy).sum() / len(self.targets)

    def answer(self) -> dict[str, Tensor]:
        """Float64 values and gradients by autograd over a plain log_softmax of the whole vocabulary."""
        hidden, weight = (x.double().requires_grad_() for x in (self.hidden, self.weight))
        log_p = torch.log_softmax(hidden @ weight.t() / self.temperature, -1)
        logp = log_p.gather(1, self.targets[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        loss = self.token_loss(slice(None), logp, entropy)
        loss.backward()
        found = {"loss": loss, "logp": logp, "entropy": entropy, "hidden_grad": hidden.grad, "weight_grad": weight.grad}
        return {name: value.detach() for name, value in found.items()}


def loss_case(
    rows: int, hidden: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, temperature: float = 0.7
) -> Case:
    """A case with old log-probs around the policy's own, so that some rows are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, hidden, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(vocab, hidden, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    log_p = torch.log_softmax(states.double() @ weight.double().t() / temperature, -1)
    near = log_p.gather(1, targets[:, None])[:, 0].float() + 0.4 * torch.randn(rows, generator=generator)
    return Case(states, weight, targets, near, torch.randn(rows, generator=generator), temperature)
