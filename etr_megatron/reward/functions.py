"""Turn `reward.function` into a callable that grades one request inside a grader process."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Awaitable, Callable, Mapping
from numbers import Real
from typing import Any

from etr_megatron.config import RewardConfig
from etr_megatron.imports import (
    ImportPathError,
    accepts_arguments,
    error_message,
    has_parameter,
    import_function,
    request_handler,
)
from etr_megatron.reward.grade import Grade, GradeRequest
from etr_megatron.types import Message

Grader = Callable[[GradeRequest], Grade]
AsyncGrader = Callable[[GradeRequest], Awaitable[Grade]]

ROUNDING = 1e-6
"""A reward outside the range by at most this fraction of the range is clamped: float32 sums have errors of this size."""


def load_grader(config: RewardConfig) -> Grader | AsyncGrader:
    """The grader that `config.function` names, ready to grade (imports done, parsers warmed up). It is a coroutine function if
    the user's function is one.

    Raises ImportPathError if the user's function cannot be imported or takes other arguments.
    """
    if config.function == "math":
        from etr_megatron.reward import symbolic

        symbolic.warm_up()
        return lambda request: _grade_math(request, config)
    function = import_function(config.function)
    # `messages` is passed by name: as a fourth positional parameter it would get the columns.
    named = ("messages",) if has_parameter(function, "messages") else ()
    if not accepts_arguments(function, 4 if config.columns else 3, named):
        wanted = "three arguments, the prompt, the response and the answer (a fourth is given with reward.columns)"
        if config.columns:
            wanted = "four arguments, the prompt, the response, the answer and a dict of reward.columns"
        raise ImportPathError(f"it must be callable with {wanted}" + ", besides `messages`, given by name" * bool(named))

    def ask(request: GradeRequest) -> Any:
        extra = (request.extra,) if config.columns else ()
        messages = {"messages": request.messages or _single_turn(request)} if named else {}
        return function(request.prompt, request.response, request.answer, *extra, **messages)

    def refuse(error: BaseException) -> Grade:
        return Grade(config.range_min, "error", error_message(config.function, error))

    return request_handler(function, ask, lambda value: _grade_of(value, config), refuse)


def _grade_math(request: GradeRequest, config: RewardConfig) -> Grade:
    from etr_megatron.reward.math_reward import UnusableReferenceError, verify_answer

    try:
        comparison = verify_answer(request.response, request.answer, config)
    except UnusableReferenceError as error:
        return Grade(config.range_min, "error", str(error))
    return Grade(config.range_max if comparison.correct else config.range_min, "ok", comparison.detail)


def _grade_of(value: Any, config: RewardConfig) -> Grade:
    """The grade from the value that a user's function returned. A value that is not a reward gets the status "error" or
    "out_of_range".

    In a dict, as verl's scorers return it, `score` is the reward, and other numbers become the grade's parts.
    """
    parts: dict[str, float] = {}
    if isinstance(value, Mapping):
        if "score" not in value:
            return Grade(config.range_min, "error", f"{config.function} returned a dict without `score`, which is the reward")
        parts = {str(name): float(part) for name, part in value.items() if name != "score" and _is_number(part)}
        value = value["score"]
    try:
        reward = float("nan") if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # numpy and torch types raise various exceptions
        reward = float("nan")
    if not math.isfinite(reward):
        shown = reprlib.repr(value)  # does not fail if the value's own repr does
        return Grade(config.range_min, "error", f"{config.function} returned {shown}, which is not a finite number")
    within = min(max(reward, config.range_min), config.range_max)
    if abs(reward - within) > ROUNDING * (config.range_max - config.range_min):
        detail = (
            f"{config.function} returned {reward}, outside reward.range_min = {config.range_min} to reward.range_max = "
            f"{config.range_max}"
        )
        return Grade(config.range_min, "out_of_range", detail)
    return Grade(within, "ok", "", parts)


def _single_turn(request: GradeRequest) -> list[Message]:
    return [{"role": "user", "content": request.prompt}, {"role": "assistant", "content": request.response}]


def _is_number(value: object) -> bool:
    """Whether the value is a finite number, of Python or numpy."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond a float's range
        return False
