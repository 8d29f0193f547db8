"""What every rollout engine can do, whether it lives in the ranks or in servers of its own."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.types import FinishReason, Problem, Sample
from etr_megatron.weights import TrainingLayout
from etr_megatron.weights.transport import Shards


@dataclass(frozen=True)
class Sampling:
    """How to draw responses. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off. seed, step: of the run. routing:
    whether to say which experts were chosen."""

    samples: int
    max_tokens: int
    temperature: float
    seed: int
    step: int
    top_p: float = 1.0
    top_k: int = 0
    routing: bool = False


def sample_seed(sampling: Sampling, problem: Problem, index: int) -> int:
    """Seed of one response, from (seed, step, prompt, sample) alone: the layout and the batching have no part in it."""
    text = f"{sampling.seed}/{sampling.step}/{problem.id}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class EngineGoneError(RuntimeError):
    """The engine can generate nothing any more, on any rank; the policy is unharmed."""


class NeedsSyncError(RuntimeError):
    """What is left to be drawn may have killed a server, and is not risked at the last one: a weight sync, after which it is to
    be asked again, brings others back."""


class RefusedError(UserError):
    """The engine calls what it is asked wrong, which asking again does not mend; the engine and the policy are unharmed."""


class OtherModelError(UserError):
    """All that there is to draw from computes something else than the trainer; the policy is unharmed."""


LOOK_S = 1.0
"""How often a wait for responses looks whether a rank must stop."""

MustStop = Callable[[], bool]


def never() -> bool:
    """Nobody tells this rank to stop."""
    return False


class WeightSource(Protocol):
    """The policy's weights as they are now. layout: who holds what."""

    layout: TrainingLayout

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Full HF tensors by name; a collective."""
        ...

    def shards(self) -> Shards:
        """This rank's parameters by `Weight.megatron`."""
        ...

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sequence[Tensor]:
        """Log-probs of the responses in (prompt ids, response ids), as the sampler's temperature has them; a collective."""
        ...


class RolloutEngine(Protocol):
    """Every method but `close` is a collective: all ranks call it with the same arguments and get the same result.

    An engine that has lost what it generates with raises EngineGoneError on every rank, one that will not RefusedError, one
    that has lost too much of it NeedsSyncError.
    """

    weight_version: int
    """Version of the weights that the next response is drawn from."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling, must_stop: MustStop = never) -> list[list[Sample]]:
        """`sampling.samples` responses to each problem, in order; rewards and texts are not filled in.

        One that the engine has given up is empty, with finish reason "abort". must_stop: whether this rank was told to stop; an
        engine whose responses are drawn elsewhere then raises StopAskedError on every rank.
        """
        ...

    def update_weights(self, weights: WeightSource, version: int) -> None:
        """Take over all weights; only then does `weight_version` change.

        The embedded engine raises ValueError naming the tensors that are missing, unknown or of the wrong shape; for servers
        see `SglangEngine.update_weights`.
        """
        ...

    def release(self) -> None:
        """Give up memory that training needs, where it is shared, until the next `update_weights`; nothing is under way."""
        ...

    def close(self) -> None:
        """Give up what the engine holds."""
        ...


@dataclass(frozen=True)
class Draw:
    """A response to be drawn, or to be drawn on. key: the asker's. drawn: response tokens that are there already."""

    key: int
    problem: Problem
    index: int
    sampling: Sampling
    drawn: Sequence[int] = ()


@dataclass(frozen=True)
class Drawn:
    """What came after `Draw.drawn`, all of it from weights of one version. finish_reason: "abort" when it was cut off.

    routing: of all tokens from the prompt's first on, see `Sample`.
    given_up: why nobody is asked for this response any more, empty where that is not so.
    """

    key: int
    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    weight_version: int
    given_up: str = ""
    routing: array[int] = field(default_factory=lambda: array("B"))


class StreamingEngine(RolloutEngine, Protocol):
    """An engine that draws while the ranks do something else. What is added here is no collective: rank 0 alone calls it."""

    def submit(self, draws: Sequence[Draw]) -> None:
        """Begin, in this order as far as there is room; each is answered once, by `wait` or `stop`."""
        ...

    def wait(self, timeout_s: float) -> list[Drawn]:
        """What has been drawn since the last call; waits until there is something, or at most so long.

        Raises EngineGoneError, NeedsSyncError and RefusedError.
        """
        ...

    def stop(self, *, abort: bool) -> list[Drawn]:
        """The same, and nothing is under way when it returns. Never raises.

        abort: cut off what is under way; otherwise wait for it. What the engine could not answer has to be asked again.
        """
        ...
