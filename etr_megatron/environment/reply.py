"""Requests to an environment and its replies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from etr_megatron.types import EnvironmentStatus, Message


@dataclass(frozen=True, slots=True)
class EnvironmentRequest:
    """A response that waits for a reply. messages: all chat messages so far; the last is the model's turn. answer: the
    reference answer as in the data. extra: values of `reward.columns`. response_id: `<problem>@<step>/<sample>`, unique in a
    run except that a redrawn response has the same id again."""

    messages: list[Message]
    answer: str
    extra: dict[str, Any]
    response_id: str


@dataclass(frozen=True, slots=True)
class EnvironmentReply:
    """The environment's answer to a turn.

    messages: the reply, at least one message; None if the response ends here.
    status: "ok", "timeout" (the call was cancelled, or its worker killed, at `environment.timeout_s`) or "error" (the function
        raised, returned something that is not a reply, or crashed its process twice). `messages` is None unless it is "ok".
    detail: what went wrong, for people to read.
    """

    messages: list[Message] | None
    status: EnvironmentStatus
    detail: str
