"""Functions that a user names by import path, `package.module:function`."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_USERS_ERRORS = (Exception, SystemExit, asyncio.CancelledError)
"""Errors that a user's function may raise: a script's main() may call sys.exit, and a coroutine may cancel itself."""


class ImportPathError(Exception):
    """The function cannot be imported; the message says why."""


def import_function(path: str) -> Callable[..., Any]:
    """The callable that `path` names. Raises ImportPathError if it cannot be imported or is not callable."""
    module_name, _, attributes = path.partition(":")
    if module_name.endswith(".py"):
        raise ImportPathError(f"{module_name} is a file name; give the module's name, without .py")
    # A rank that torchrun started as a script has the script's folder on sys.path, not the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way, and a script calls sys.exit
        raise ImportPathError(
            f"importing {module_name} failed with {type(error).__name__}: {error} (looked in {os.getcwd()} and PYTHONPATH)"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise ImportPathError(f"{module_name} has no {attributes}")
        found = getattr(found, attribute)
    if not callable(found):
        raise ImportPathError(f"{attributes} in {module_name} is not callable")
    return found


def accepts_arguments(function: Callable[..., Any], arguments: int, names: Iterable[str] = ()) -> bool:
    """Whether a function can be called with `arguments` positional arguments and these named ones."""
    try:
        inspect.signature(function).bind(*[None] * arguments, **dict.fromkeys(names))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: only a call can tell
        return True
    return True


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name that can be passed by name."""
    try:
        parameter = inspect.signature(function).parameters.get(name)
    except ValueError:  # a builtin without a signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def request_handler(
    function: Callable[..., Any],
    ask: Callable[[Any], Any],
    accept: Callable[[Any], Any],
    refuse: Callable[[BaseException], Any],
) -> Callable[[Any], Any]:
    """A function that answers requests by calling the user's `function`. It is a coroutine function if `function`, or the
    `__call__` of its class, is one.

    ask: calls `function` for a request. accept: makes the answer from the returned value. refuse: makes it from the error.
    """
    runner = asyncio.Runner()  # one event loop for all calls of a function that returns awaitables, but is no `async def`

    def answer(request: Any) -> Any:
        try:
            return accept(_awaited(ask(request), runner))
        except _USERS_ERRORS as error:
            return refuse(error)

    async def answer_async(request: Any) -> Any:
        try:
            return accept(await ask(request))
        except _USERS_ERRORS as error:
            return refuse(error)

    is_coroutine_function = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return answer_async if is_coroutine_function else answer


def _awaited(value: Any, runner: asyncio.Runner) -> Any:
    """The value that a function returned or, if it is awaitable, as from a decorated `async def`, the result of awaiting it."""

    async def result() -> Any:
        return await value

    return runner.run(result()) if inspect.isawaitable(value) else value


def error_message(path: str, error: BaseException) -> str:
    """A message about the error that the function at `path` raised, with the last line of its own module in the traceback."""
    file = getattr(sys.modules.get(path.partition(":")[0]), "__file__", None)
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" ({Path(lines[-1].filename).name}:{lines[-1].lineno})" if lines else ""
    try:
        said = f": {error}" if str(error) else ""
    except Exception:  # raised by the error's own __str__
        said = ""
    return f"{path} raised {type(error).__name__}{said}{where}"
