"""Turn `environment.function` into a callable that answers one request inside a worker process."""

from __future__ import annotations

import reprlib
from collections.abc import Awaitable, Callable
from typing import Any

from etr_megatron.config import EnvironmentConfig
from etr_megatron.environment.reply import EnvironmentReply, EnvironmentRequest
from etr_megatron.imports import (
    ImportPathError,
    accepts_arguments,
    error_message,
    has_parameter,
    import_function,
    request_handler,
)
from etr_megatron.types import Message, further_keys

Environment = Callable[[EnvironmentRequest], EnvironmentReply]
AsyncEnvironment = Callable[[EnvironmentRequest], Awaitable[EnvironmentReply]]


def load_environment(config: EnvironmentConfig) -> Environment | AsyncEnvironment:
    """The environment that `config.function` names. It is a coroutine function if the user's function is one, and never raises
    an Exception.

    Raises ImportPathError if the user's function cannot be imported or takes other arguments.
    """
    path = config.function
    assert path is not None
    function = import_function(path)
    named = ("response_id",) if has_parameter(function, "response_id") else ()
    if not accepts_arguments(function, 3, named):
        wanted = "three arguments, the messages, the answer and a dict of reward.columns"
        raise ImportPathError(f"it must be callable with {wanted}" + ", besides `response_id`, given by name" * bool(named))

    def ask(request: EnvironmentRequest) -> Any:
        return function(request.messages, request.answer, request.extra, **{name: getattr(request, name) for name in named})

    def refuse(error: BaseException) -> EnvironmentReply:
        return EnvironmentReply(None, "error", error_message(path, error))

    return request_handler(function, ask, lambda value: _reply(value, config), refuse)


def _reply(value: object, config: EnvironmentConfig) -> EnvironmentReply:
    """The reply that a user's function returned."""
    if value is None:
        return EnvironmentReply(None, "ok", "")
    if isinstance(value, str):
        value = {"role": config.role, "content": value}
    try:
        messages = [_message(one) for one in _messages(value)]
    except ValueError as error:
        shown = reprlib.repr(value)  # does not fail if the value's own repr does
        return EnvironmentReply(None, "error", f"{config.function} returned {shown}, {error}")
    return EnvironmentReply(messages, "ok", "")


def _messages(value: object) -> list[Any]:
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise ValueError("which is not text, a list of chat messages, or None")
    if not value:
        raise ValueError("which has no message; None ends a response")
    return value


def _message(one: Any) -> Message:
    """The message with only its role and content, under the same rules as messages in `data`. Raises ValueError."""
    if not isinstance(one, dict) or not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
        raise ValueError("in which a message is not a dict with `role` and `content`, both text")
    message = {"role": str(one["role"]), "content": str(one["content"])}
    if more := further_keys(one):
        raise ValueError(f"in which a message has `{more[0]}`, but only `role` and `content` are supported")
    if not message["role"]:
        raise ValueError("in which a message has an empty role")
    try:
        "".join(message.values()).encode()
    except UnicodeEncodeError:
        raise ValueError("in which a message has half a surrogate pair, which no tokenizer accepts") from None
    return message
