"""The interface of every rollout engine, whether it runs in the ranks or in separate servers."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.types import FinishReason, Problem, Sample
from etr_megatron.weights import TrainingLayout
from etr_megatron.weights.transport import Shards


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    samples: responses per problem, as one number or one per problem. max_tokens: token limit of a response, likewise.
    `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off. seed, step: those of the run. routing: whether to return the
    chosen experts. continued: the responses' names if further turns of them are generated, see `names_of`.
    """

    samples: int | tuple[int, ...]
    max_tokens: int | tuple[int, ...]
    temperature: float
    seed: int
    step: int
    top_p: float = 1.0
    top_k: int = 0
    routing: bool = False
    continued: tuple[str, ...] = ()

    def samples_of(self, problems: Sequence[Problem]) -> tuple[int, ...]:
        """Number of responses to each problem. Raises ValueError if `samples` is given for another number of problems."""
        return _of_each(self.samples, problems, "samples has numbers of responses")

    def max_tokens_of(self, problems: Sequence[Problem]) -> tuple[int, ...]:
        """Token limit of a response to each problem. Raises ValueError if `max_tokens` is given for another number of
        problems."""
        return _of_each(self.max_tokens, problems, "max_tokens has limits")

    def names_of(self, problems: Sequence[Problem]) -> list[str]:
        """Names of the responses to these problems, in order: `<id of the problem in the first turn>/<index>`. A response has
        the same name in all its turns."""
        counts = zip(problems, self.samples_of(problems), strict=True)
        return list(self.continued) or [f"{problem.id}/{index}" for problem, count in counts for index in range(count)]


def _of_each(value: int | tuple[int, ...], problems: Sequence[Problem], what: str) -> tuple[int, ...]:
    values = (value,) * len(problems) if isinstance(value, int) else value
    if len(values) != len(problems):
        raise ValueError(f"{what} for {len(values)} problems, but there are {len(problems)}")
    return values


def sample_seed(sampling: Sampling, problem: Problem, index: int) -> int:
    """Seed of one response. It depends only on (seed, step, prompt, sample), not on layout or batching."""
    text = f"{sampling.seed}/{sampling.step}/{problem.id}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class EngineGoneError(RuntimeError):
    """The engine can no longer generate, on any rank; the policy is unharmed."""


class NeedsSyncError(RuntimeError):
    """The remaining requests may have killed a server, so they are not sent to the last server. A weight sync brings other
    servers back; the requests must be repeated after it."""


class RefusedError(UserError):
    """The engine rejects a request as invalid, so retrying does not help; the engine and the policy are unharmed."""


class OtherModelError(UserError):
    """Every server computes something different from the trainer; the policy is unharmed."""


STOP_POLL_S = 1.0
"""Interval in seconds at which a wait for responses checks whether a rank must stop."""

MustStop = Callable[[], bool]


def never() -> bool:
    """A `MustStop` that is always False."""
    return False


class WeightSource(Protocol):
    """The policy's current weights. layout: which rank holds which parameters."""

    layout: TrainingLayout

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Full HF tensors by name; a collective."""
        ...

    def shards(self) -> Shards:
        """This rank's parameters by `Weight.megatron`."""
        ...

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sequence[Tensor]:
        """Log-probs of the responses in (prompt ids, response ids), at the sampler's temperature; a collective."""
        ...


class RolloutEngine(Protocol):
    """Every method but `metrics` and `close` is a collective: all ranks call it with the same arguments, and get the same
    result except for responses of servers (see `generate`).

    Errors that are raised on every rank: EngineGoneError when the engine can no longer generate, RefusedError when it rejects
    a request, NeedsSyncError when it needs a weight sync to bring servers back.
    """

    weight_version: int
    """Version of the weights that the next response is generated from."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling, must_stop: MustStop = never) -> list[list[Sample]]:
        """`sampling.samples_of(problems)` responses to each problem, in order; rewards and texts are not filled in.

        A response that the engine has given up is empty and has the finish reason "abort". An engine with servers returns the
        responses on rank 0; on other ranks it returns as many responses without tokens. must_stop: whether this rank was
        asked to stop. An engine with servers then raises StopAskedError on every rank.
        """
        ...

    def update_weights(self, weights: WeightSource, version: int, must_stop: MustStop = never) -> None:
        """Load all weights. Only this method changes `weight_version`.

        must_stop: whether this rank was asked to stop. If an engine has to start servers, and a rank that waits for them was
        asked, it raises StopAskedError on every rank.

        The embedded engine raises ValueError naming the tensors that are missing, unknown or of the wrong shape; for servers
        see `SglangEngine.update_weights`.
        """
        ...

    def release(self) -> None:
        """Release memory shared with training until the next `update_weights`; no request may be in flight."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the engine's current state, and of the time since the last call, on rank 0; empty on other ranks. Not a
        collective."""
        ...

    def close(self) -> None:
        """Release the engine's resources."""
        ...


class Place(NamedTuple):
    """Where a server has cached what it generated. server: its name. group: its attention group, if it has several."""

    server: str
    group: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """A response to generate or to continue.

    key: chosen by the caller. sampling: for this problem alone. generated_ids: the response tokens so far, which count towards
    `Sampling.max_tokens`. turn_begin: how many of them precede the current turn; stop strings are matched in the text of the
    current turn alone. cached_at: where the last turn was generated and is cached (its `GenerationOutput.place`); None if
    nowhere.
    """

    key: int
    problem: Problem
    index: int
    sampling: Sampling
    generated_ids: Sequence[int] = ()
    turn_begin: int = 0
    cached_at: Place | None = None

    @property
    def max_new_tokens(self) -> int:
        """Number of tokens that may still be generated."""
        return self.sampling.max_tokens_of([self.problem])[0] - len(self.generated_ids)


@dataclass(frozen=True)
class GenerationOutput:
    """The tokens generated after `GenerationRequest.generated_ids`, all from one weight version.

    finish_reason: "abort" if generation was cut off.
    routing: for all tokens, beginning with the first of the prompt, see `Sample`.
    given_up: why the engine has given this response up; empty if it has not.
    place: where the tokens were generated, if there are servers.
    """

    key: int
    ids: array[int]
    logprobs: array[float]
    finish_reason: FinishReason
    weight_version: int
    given_up: str = ""
    routing: array[int] = field(default_factory=lambda: array("B"))
    place: Place | None = None


class StreamingEngine(RolloutEngine, Protocol):
    """An engine that generates while the ranks do other work. The methods added here are not collectives: only rank 0 calls
    them."""

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Start these requests in order, as capacity allows; `wait` or `stop` answers each of them once."""
        ...

    def wait(self, timeout_s: float) -> list[GenerationOutput]:
        """Responses that have arrived since the last call; waits for at least one, up to `timeout_s`.

        Raises EngineGoneError, NeedsSyncError and RefusedError.
        """
        ...

    def stop(self, *, abort: bool) -> list[GenerationOutput]:
        """Responses that have arrived since the last call; no request is in flight when this returns. Never raises.

        abort: cut off the requests in flight; otherwise wait for them. Requests that the engine could not answer must be
        submitted again.
        """
        ...
