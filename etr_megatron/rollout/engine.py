"""What every rollout engine can do, whether it lives in the ranks or in servers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from etr_megatron.types import Problem, Sample


@dataclass(frozen=True)
class Sampling:
    """How to draw responses. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off. seed, step: of the run."""

    samples: int
    max_tokens: int
    temperature: float
    seed: int
    step: int
    top_p: float = 1.0
    top_k: int = 0


def sample_seed(sampling: Sampling, problem: Problem, index: int) -> int:
    """Seed of one response, from (seed, step, prompt, sample) alone: the layout and the batching have no part in it."""
    text = f"{sampling.seed}/{sampling.step}/{problem.id}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class EngineGoneError(RuntimeError):
    """The engine can generate nothing any more, on any rank; the policy is unharmed."""


class RolloutEngine(Protocol):
    """Every method is a collective: all ranks call it with the same arguments and get the same result.

    An engine that has lost what it generates with raises EngineGoneError on every rank.
    """

    weight_version: int
    """Version of the weights that the next response is drawn from."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[list[Sample]]:
        """`sampling.samples` responses to each problem, in order; rewards and texts are not filled in."""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the full set of HF tensors; only then does `weight_version` change.

        Raises ValueError naming the tensors that are missing, unknown or of the wrong shape.
        """
        ...

    def close(self) -> None:
        """Give up what the engine holds."""
        ...
