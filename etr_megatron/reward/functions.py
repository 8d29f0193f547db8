"""From `reward.function` to a callable that grades one request inside a grader process."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from etr_megatron.config import RewardConfig
from etr_megatron.reward.grade import Grade, GradeRequest

Grader = Callable[[GradeRequest], Grade]


class LoadError(Exception):
    """`reward.function` cannot be loaded; the message says why."""


def load_grader(config: RewardConfig) -> Grader:
    """The grader that `config.function` names, ready to grade (imports done, parsers warm).

    Raises LoadError if the user's module or function cannot be had.
    """
    if config.function == "math":
        from etr_megatron.reward import symbolic

        symbolic.warm_up()
        return lambda request: _grade_math(request, config)
    function = _import_function(config.function)
    return lambda request: _grade_custom(function, request, config)


def _import_function(path: str) -> Callable[..., Any]:
    module_name, _, attributes = path.partition(":")
    # A rank that torchrun started as a script has the script's folder on its path, not the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way; it is his to read about
        raise LoadError(
            f"importing {module_name} failed with {type(error).__name__}: {error} (looked in {os.getcwd()} and PYTHONPATH)"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise LoadError(f"{module_name} has no {attributes}")
        found = getattr(found, attribute)
    if not callable(found):
        raise LoadError(f"{attributes} in {module_name} is not callable")
    return found


def _grade_math(request: GradeRequest, config: RewardConfig) -> Grade:
    from etr_megatron.reward.math_reward import UnusableReferenceError, judge

    try:
        verdict = judge(request.response, request.answer, config)
    except UnusableReferenceError as error:
        return Grade(config.range_min, "error", str(error))
    return Grade(config.range_max if verdict.correct else config.range_min, "ok", verdict.detail)


def _grade_custom(function: Callable[..., Any], request: GradeRequest, config: RewardConfig) -> Grade:
    """A user's function may fail on one answer: that answer is an error with its message, the run goes on."""
    try:
        value = function(request.prompt, request.response, request.answer)
        reward = float("nan") if isinstance(value, (str, bytes)) else float(value)
    except Exception as error:
        return Grade(config.range_min, "error", f"{config.function} raised {type(error).__name__}: {error}")
    if math.isnan(reward):
        return Grade(config.range_min, "error", f"{config.function} returned {value!r:.100}, which is no number")
    if not config.range_min <= reward <= config.range_max:
        return Grade(
            config.range_min,
            "error",
            f"{config.function} returned {reward}, outside of reward.range_min = {config.range_min} to "
            f"reward.range_max = {config.range_max}",
        )
    return Grade(reward, "ok", "")
