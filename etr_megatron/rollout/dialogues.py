"""Responses between the model's turns: to the environment, and on with its reply or to their end."""

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
from etr_megatron.types import Group, Message, Sample, insert

logger = logging.getLogger(__name__)

ReplyIds = Callable[[Sequence[Message], int], list[int]]
"""Token ids of a reply after a turn that ended with the given token."""

_LOOK_S = 0.01
"""Interval at which a wait looks for replies. It must not wait with the lock held: Python's locks are not fair, and another
owner would get it only now and then."""


_FEW = 8
"""Fewer calls than these, all failed, prove nothing right after calls that succeeded. A step may take groups that were ready,
and need hardly any call."""


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
    """How an owner's calls went since its last report. failure: why the first of them failed. worked: whether any call before
    that report succeeded, of those that it was about."""

    status: Counter[str] = field(default_factory=Counter)
    failure: str = ""
    worked: bool = False

    @property
    def failed(self) -> int:
        return self.status["error"] + self.status["timeout"]

    @property
    def is_broken(self) -> bool:
        """Whether no call succeeded; if all were just late, the environment may be faster at the next step."""
        calls = self.status.total()
        return self.status["error"] > 0 and self.failed == calls and (calls >= _FEW or not self.worked)

    def next(self) -> _Outcomes:
        """Those until the report after the one that is about these."""
        return _Outcomes(worked=self.status["ok"] > 0 if self.status else self.worked)


class Dialogues:
    """Takes samples whose turn has ended to the environment and hands them back; on rank 0 only.

    Several owners (the sampler, an evaluation) may use it at the same time from threads of their own; each gets back its own
    samples, which it changes in its own thread alone.
    """

    def __init__(self, environment: Environment, reply_ids: ReplyIds, decode: Decode, *, max_turns: int) -> None:
        self._environment, self._reply_ids, self._decode, self._max_turns = environment, reply_ids, decode, max_turns
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._replies: list[tuple[_Call, EnvironmentReply]] = []
        self._next = 0
        self._outcomes: defaultdict[Hashable, _Outcomes] = defaultdict(_Outcomes)

    def end_turn(self, sample: Sample) -> None:
        """Note the turn that `sample` ends with (in place; the caller owns it)."""
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
        """This owner's samples that were replied to; waits for at least one, up to `timeout_s`, if any are under way.

        Their finish reason is now "stop" if the environment had nothing to say or failed, "length" if the reply leaves no room
        for another turn, else "abort", with the reply's tokens appended: the next turn can be drawn. Raises UngradedError if
        `environment.function` can no longer be loaded.
        """
        end = time.monotonic() + timeout_s
        while True:
            with self._lock, saved_first():
                replies = [(self._calls.pop(key, None), reply) for key, reply in self._environment.poll(0.0)]
                self._replies += [(call, reply) for call, reply in replies if call is not None]  # others are forgotten
                own = [pair for pair in self._replies if pair[0].owner == owner]
                self._replies = [pair for pair in self._replies if pair[0].owner != owner]
                waits = any(call.owner == owner for call in self._calls.values())
            left = end - time.monotonic()
            if own or not waits or left <= 0:
                return [self._accept(call, reply) for call, reply in own]
            time.sleep(min(left, _LOOK_S))

    def forget(self, owner: Hashable) -> None:
        """Drop this owner's samples: their replies will be ignored."""
        with self._lock:
            self._calls = {key: call for key, call in self._calls.items() if call.owner != owner}
            self._replies = [pair for pair in self._replies if pair[0].owner != owner]

    def is_broken(self, owner: Hashable) -> bool:
        """Whether `report` would raise an error."""
        with self._lock:
            return owner in self._outcomes and self._outcomes[owner].is_broken

    def report(self, owner: Hashable) -> None:
        """Warn about this owner's calls that failed since its last report, with the first one's reason.

        Raises UngradedError if all failed, not just by being late: a broken environment must not look like a policy without an
        answer. A few calls may fail once after others that succeeded.
        """
        with self._lock:
            found = self._outcomes[owner]
            self._outcomes[owner] = found.next()
        if not found.failed:
            return
        calls = found.status.total()
        what = f"{found.failed} of {calls} calls of environment.function failed, which ended their responses; the first: "
        if found.is_broken:
            raise UngradedError(f"{what}{found.failure}; fix environment.function, or what it calls")
        logger.warning("%s%s", what, found.failure)

    def _accept(self, call: _Call, reply: EnvironmentReply) -> Sample:
        sample, status, detail = call.sample, reply.status, reply.detail
        ids: list[int] = []
        if reply.messages is not None:
            try:
                ids = self._reply_ids(reply.messages, sample.response_ids[-1])
                if not ids:
                    status, detail = "error", "it returned a reply without a token"
            except UserError as error:  # of the chat template: what one call returned must not end the run
                status, detail = "error", str(error)
        sample.environment_status = status
        with self._lock:
            outcomes = self._outcomes[call.owner]
            outcomes.status[status] += 1
            if status != "ok":
                outcomes.failure = outcomes.failure or f"{_brief(detail)} (problem {call.group.problem.id})"
        if reply.messages is None or not ids:
            sample.finish_reason = "stop"
            return sample
        if sample.turns >= self._max_turns or len(sample.response_ids) + len(ids) >= call.limit:
            sample.finish_reason = "length"
            return sample
        insert(sample, ids)
        sample.messages += reply.messages
        sample.finish_reason = "abort"
        return sample


def _brief(detail: str) -> str:
    """On one line, without the middle of what is long: an exception may have a server's whole page as its text."""
    line = " ".join(detail.split())
    return line if len(line) <= 1000 else f"{line[:800]} ... {line[-200:]}"
