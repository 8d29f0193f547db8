"""Multi-turn responses between two turns of the model: gets the environment's reply, and appends it or ends the response."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from etr_megatron.environment import EnvironmentReply, EnvironmentRequest
from etr_megatron.errors import UserError
from etr_megatron.rollout.collect import Decode, UngradedError, saved_first
from etr_megatron.types import Group, Message, Sample, append_reply_tokens

logger = logging.getLogger(__name__)

ReplyIds = Callable[[Sequence[Message], int], list[int]]
"""Maps (the reply's messages, the last token of the turn before) to the token ids of the reply."""

_POLL_S = 0.01
"""Polling interval in seconds for replies. A wait polls because it must not hold the lock: Python's locks are not fair, and
other owners would rarely acquire it."""


_FEW = 8
"""Fewer failed calls than this are not evidence of a broken environment if the calls before them succeeded. A step that takes
groups that were ready makes very few calls."""


class Environment(Protocol):
    """The part of `EnvironmentPool` that is used here."""

    def submit(self, key: int, request: EnvironmentRequest) -> None:
        """See `EnvironmentPool.submit`."""
        ...

    def poll(self, timeout_s: float) -> list[tuple[int, EnvironmentReply]]:
        """See `EnvironmentPool.poll`."""
        ...


@dataclass(frozen=True)
class _Call:
    owner: Hashable
    group: Group
    sample: Sample
    limit: int


@dataclass
class _Outcomes:
    """Results of an owner's calls since its last report. failure: why the first failed call failed. last_failure: why the last
    one failed, also before that report. worked: whether any call in the period before that report succeeded."""

    status: Counter[str] = field(default_factory=Counter)
    failure: str = ""
    last_failure: str = ""
    worked: bool = False

    @property
    def failed(self) -> int:
        return self.status["error"] + self.status["timeout"]

    @property
    def is_broken(self) -> bool:
        """Whether no call succeeded. False if all timed out: the environment may be faster at the next step (`LateSteps`)."""
        calls = self.status.total()
        return self.status["error"] > 0 and self.failed == calls and (calls >= _FEW or not self.worked)

    def next(self) -> _Outcomes:
        """Empty results for the next period: from the report of these results to the report after it."""
        worked = self.status["ok"] > 0 if self.status else self.worked
        return _Outcomes(worked=worked, last_failure=self.last_failure)


class Dialogues:
    """Sends samples whose turn has ended to the environment, and returns them with its replies; on rank 0 only.

    Several owners (the sampler, an evaluation) may use it at the same time, each from its own thread. An owner gets back only
    its own samples, and they are changed only in the owner's thread.
    """

    def __init__(self, environment: Environment, reply_ids: ReplyIds, decode: Decode, *, max_turns: int) -> None:
        self._environment, self._reply_ids, self._decode, self._max_turns = environment, reply_ids, decode, max_turns
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._replies: list[tuple[_Call, EnvironmentReply]] = []
        self._next = 0
        self._outcomes: defaultdict[Hashable, _Outcomes] = defaultdict(_Outcomes)

    def end_turn(self, sample: Sample) -> None:
        """Append the last turn of `sample` to its messages (in place; the caller owns it)."""
        turn = sample.response_ids[sample.turn_begin :].tolist()
        sample.messages.append({"role": "assistant", "content": self._decode(turn)})

    def submit(self, owner: Hashable, group: Group, sample: Sample, limit: int) -> None:
        """Ask the environment for a reply to `sample` of `group`, whose turn has ended. limit: tokens of the whole response.

        Raises UngradedError if `environment.function` can no longer be loaded.
        """
        problem, messages = group.problem, [*group.problem.messages, *sample.messages]
        request = EnvironmentRequest(messages, problem.answer, problem.extra, f"{group.id}/{sample.index}")
        with self._lock, saved_first():
            key, self._next = self._next, self._next + 1
            self._calls[key] = _Call(owner, group, sample, limit)
            self._environment.submit(key, request)

    def ended(self, owner: Hashable, timeout_s: float) -> list[Sample]:
        """This owner's samples whose call has returned; waits up to `timeout_s` for at least one if calls are pending.

        The new finish reason of a sample:
        - "stop": the environment returned no reply, or its call failed.
        - "length": the reply leaves no room for another turn.
        - "abort": the reply's tokens were appended, and the next turn can be generated.

        Raises UngradedError if `environment.function` can no longer be loaded.
        """
        end = time.monotonic() + timeout_s
        while True:
            with self._lock, saved_first():
                replies = [(self._calls.pop(key, None), reply) for key, reply in self._environment.poll(0.0)]
                self._replies += [(call, reply) for call, reply in replies if call is not None]  # else it was forgotten
                own = [pair for pair in self._replies if pair[0].owner == owner]
                self._replies = [pair for pair in self._replies if pair[0].owner != owner]
                waits = any(call.owner == owner for call in self._calls.values())
            left = end - time.monotonic()
            if own or not waits or left <= 0:
                return [self._accept(call, reply) for call, reply in own]
            time.sleep(min(left, _POLL_S))

    def forget(self, owner: Hashable) -> None:
        """Drop this owner's pending samples; their replies will be ignored."""
        with self._lock:
            self._calls = {key: call for key, call in self._calls.items() if call.owner != owner}
            self._replies = [pair for pair in self._replies if pair[0].owner != owner]

    def is_broken(self, owner: Hashable, responses: Sequence[Sample] = ()) -> bool:
        """Whether `report` would raise an error."""
        with self._lock:
            return (owner in self._outcomes and self._outcomes[owner].is_broken) or _all_failed(responses)

    def report(self, owner: Hashable, responses: Sequence[Sample] = ()) -> None:
        """Log a warning about this owner's calls that failed since its last report, with the reason of the first.

        responses: this owner's, those that may be trained on next. Raises UngradedError in two cases, but not if all failures
        are timeouts: a broken environment must not look like a policy without an answer.
        - All calls failed. Does not raise for fewer than `_FEW` calls if calls in the period before succeeded.
        - Failed calls ended all of `responses`, even if earlier calls succeeded: there is nothing to train on.
        """
        with self._lock:
            found = self._outcomes[owner]
            self._outcomes[owner] = found.next()
        fix = "fix environment.function, or what it calls"
        calls = found.status.total()
        what = f"{found.failed} of {calls} calls of environment.function failed, which ended their responses; the first: "
        if found.is_broken:
            raise UngradedError(f"{what}{found.failure}; {fix}")
        if _all_failed(responses):
            last = found.last_failure or "before the run was started again"
            count = len(responses)
            raise UngradedError(f"failed calls of environment.function ended all {count} responses; the last: {last}; {fix}")
        if found.failed:
            logger.warning("%s%s", what, found.failure)

    def _accept(self, call: _Call, reply: EnvironmentReply) -> Sample:
        sample, status, detail = call.sample, reply.status, reply.detail
        ids: list[int] = []
        if reply.messages is not None:
            try:
                ids = self._reply_ids(reply.messages, sample.response_ids[-1])
                if not ids:
                    status, detail = "error", "it returned a reply without a token"
            except UserError as error:  # from the chat template: the reply of one call must not end the run
                status, detail = "error", str(error)
        sample.environment_status = status
        with self._lock:
            outcomes = self._outcomes[call.owner]
            outcomes.status[status] += 1
            if status != "ok":
                outcomes.last_failure = f"{_brief(detail)} (problem {call.group.problem.id})"
                outcomes.failure = outcomes.failure or outcomes.last_failure
        if reply.messages is None or not ids:
            sample.finish_reason = "stop"
            return sample
        if sample.turns >= self._max_turns or len(sample.response_ids) + len(ids) >= call.limit:
            sample.finish_reason = "length"
            return sample
        append_reply_tokens(sample, ids)
        sample.messages += reply.messages
        sample.finish_reason = "abort"
        return sample


def _all_failed(responses: Sequence[Sample]) -> bool:
    """Whether failed calls ended all of these responses. False if all timed out, as in `_Outcomes.is_broken`."""
    failed = all(sample.call_failed for sample in responses)
    return failed and any(sample.environment_status == "error" for sample in responses)


def _brief(detail: str) -> str:
    """The text on one line; the middle of a long text is cut out, as an exception may contain a server's whole error page."""
    line = " ".join(detail.split())
    return line if len(line) <= 1000 else f"{line[:800]} ... {line[-200:]}"
