"""Data types shared by all packages: a `Problem` goes in, a `Group` of `Sample`s comes back.

Plain Python on purpose: these objects cross process boundaries (ranks, workers, servers) and are written to disk. Per-token
fields are `array`s, which take less than a fifth of a list's memory: every rank holds a whole step's samples.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, groupby
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")

FinishReason = Literal["stop", "length", "abort", "turn"]
RewardStatus = Literal["ok", "timeout", "error", "out_of_range"]
EnvironmentStatus = Literal["ok", "timeout", "error"]
Message = dict[str, str]
"""A chat message: `role` and `content`."""


def further_keys(message: Mapping[str, Any]) -> list[str]:
    """Keys of a message other than `role` and `content`. Keys with an empty value, such as `"tool_calls": []`, do not count:
    clients and exports write them."""
    further = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [key for key, value in further.items() if value is not None and (value or not isinstance(value, str | list | dict))]


TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "tekken.json", "spiece.model")
"""A model directory with a tokenizer has at least one of these."""

MAX_REPLAYED_EXPERTS = 256
"""Maximum number of experts in `Sample.routing`, which stores one byte per choice to save memory."""


@dataclass(slots=True)
class Problem:
    """One prompt with its verifiable answer.

    id: stable name of the row in its source (`<file>:<row>` unless the data has an id column).
    prompt: the user's text, before the chat template is applied; the last message if there are several.
    answer: the reference answer as the verifier expects it.
    prompt_ids: token ids of the templated prompt, the engine's input; any integers are converted. An array: every rank has all
        problems, and lists would take eight times the memory.
    extra: further columns by name, plain JSON values, for a custom reward function or environment.
    messages: with an environment, the chat messages that `prompt_ids` were made from; else empty.
    """

    id: str
    prompt: str
    answer: str
    prompt_ids: array[int] = field(default_factory=lambda: array("i"))
    extra: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_ids = array("i", self.prompt_ids)


@dataclass(slots=True)
class Sample:
    """One response to a prompt: the tokens that the model generated and, with an environment, the replies between its turns.

    index: position in the group; the group and the index seed the sampling.
    response_ids: all token ids after the prompt, the end-of-sequence token included when `finish_reason` is "stop".
    rollout_logprobs: natural-log probability of each response token under the engine's *tempered* distribution (before
        top-p/top-k), same length as `response_ids`; 0 for tokens of replies.
    finish_reason: "abort" marks an unfinished response, "turn" a response that waits for the environment's reply. Groups that
        are trained on have neither.
    weight_version: version of the weights that the last token was sampled from.
    weight_versions: the version of each token if the response was continued after a weight sync; else empty.
    routing: with routing replay, the experts that the engine chose, flattened from [token, MoE layer, expert of the token].
        Covers the prompt and the response without its last token; shorter or empty if the engine did not report them all.
        Rank 0 has it; on other ranks it may be missing in samples that they did not generate themselves.
    reward_parts: further numbers that the user's reward function returned, by name.
    loss_mask: for each response token, 1 if the model generated it, 0 if it belongs to a reply; empty if it generated all.
    messages: with an environment, the model's turns and the replies, in order; else empty.
    environment_status: status of the last call of the environment for this response; None if there was none.

    response_ids, rollout_logprobs, weight_versions and loss_mask may be any sequences; they are stored as arrays of type "i",
    "d", "i" and "B".
    """

    index: int
    response_ids: array[int]
    rollout_logprobs: array[float]
    finish_reason: FinishReason
    weight_version: int
    text: str = ""
    reward: float | None = None
    reward_status: RewardStatus | None = None
    weight_versions: array[int] = field(default_factory=lambda: array("i"))
    routing: array[int] = field(default_factory=lambda: array("B"))
    reward_parts: dict[str, float] = field(default_factory=dict)
    loss_mask: array[int] = field(default_factory=lambda: array("B"))
    messages: list[Message] = field(default_factory=list)
    environment_status: EnvironmentStatus | None = None

    def __post_init__(self) -> None:
        self.response_ids = array("i", self.response_ids)
        self.rollout_logprobs = array("d", self.rollout_logprobs)
        self.weight_versions = array("i", self.weight_versions)
        self.loss_mask = array("B", self.loss_mask)

    def known_reward(self) -> float:
        """The reward. The sample must have been graded."""
        assert self.reward is not None
        return self.reward

    def token_versions(self) -> array[int]:
        """Version of the weights that each response token was sampled from."""
        return self.weight_versions or array("i", [self.weight_version]) * len(self.response_ids)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be generated for this response."""
        return self.finish_reason in ("stop", "length")

    @property
    def num_generated(self) -> int:
        """Number of response tokens that the model generated."""
        return sum(self.loss_mask) if self.loss_mask else len(self.response_ids)

    @property
    def call_failed(self) -> bool:
        """Whether a failed call of the environment ended the response."""
        return self.environment_status not in ("ok", None)

    @property
    def turns(self) -> int:
        """Number of the model's turns: runs of tokens that it generated."""
        return sum(is_generated for is_generated, _ in groupby(self.loss_mask)) if self.loss_mask else 1

    @property
    def turn_begin(self) -> int:
        """Number of response tokens before the model's last turn. That turn may have no tokens yet."""
        return bytes(self.loss_mask).rfind(b"\0") + 1

    def select_generated(self, values: Sequence[T]) -> Sequence[T]:
        """From values with one entry per response token, the entries of the tokens that the model generated."""
        return select_generated(values, self.loss_mask)


def select_generated(values: Sequence[T], loss_mask: Sequence[int]) -> Sequence[T]:
    """The values at positions where `loss_mask` is 1; all values if it is empty."""
    return list(compress(values, loss_mask)) if loss_mask else values


def append_reply_tokens(sample: Sample, ids: Sequence[int]) -> None:
    """Append tokens that the model did not generate (in place; the caller owns the sample)."""
    versions = sample.token_versions()
    sample.loss_mask = (sample.loss_mask or array("B", [1]) * len(sample.response_ids)) + array("B", [0]) * len(ids)
    sample.response_ids.extend(ids)
    sample.rollout_logprobs.extend([0.0] * len(ids))
    if sample.weight_versions:
        sample.weight_versions = versions + versions[-1:] * len(ids)


class TokenSequence(NamedTuple):
    """A sample's tokens as the policy sees them. loss_mask: see `Sample`; only generated tokens are predicted."""

    prompt: Sequence[int]
    response: Sequence[int]
    loss_mask: Sequence[int] = ()

    @property
    def rows(self) -> int:
        """Number of predicted tokens."""
        return sum(self.loss_mask) if self.loss_mask else len(self.response)


AnySequence = TokenSequence | tuple[Sequence[int], Sequence[int]]
"""A `TokenSequence`, or (prompt ids, response ids) if all of the response is generated; `TokenSequence(*one)` takes both."""


@dataclass(slots=True)
class Group:
    """All responses to one prompt. Group statistics (mean, deviation, variance) leave out responses that a failed call ended.

    id: unique within a run, `<problem id>@<step>`: the same problem in a later step is another group.
    """

    id: str
    problem: Problem
    samples: list[Sample]

    @property
    def has_zero_variance(self) -> bool:
        """Whether all rewards in the group statistics are equal, so that advantages and gradient are zero."""
        return len({sample.reward for sample in self.samples if not sample.call_failed}) <= 1
