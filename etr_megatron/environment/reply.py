"""Requests to an environment and its replies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from etr_megatron.types import EnvironmentStatus, Message


@dataclass(frozen=True, slots=True)
class EnvironmentRequest:
    """A response that waits for a reply. messages: all so far, the model's turn last. answer: the reference answer as in the
    data. extra: values of `reward.columns`. response_id: `<problem>@<step>/<sample>`, unique in a run but for redrawn ones."""

    messages: list[Message]
    answer: str
    extra: dict[str, Any]
    response_id: str


@dataclass(frozen=True, slots=True)
class EnvironmentReply:
    """What the environment made of a turn.

    messages: the reply, at least one message; None if the response ends here.
    status: "ok", "timeout" (the call was cancelled, or its worker killed, at `environment.timeout_s`) or "error" (the function
        raised, returned something else than a reply, or crashed its process twice). Not "ok" implies that `messages` is None.
    detail: what went wrong, for people.
    """

    messages: list[Message] | None
    status: EnvironmentStatus
    detail: str
