"""SGLang's command-line arguments, read from `--help` of the server that will be started."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from etr_megatron.config import SglangConfig
from etr_megatron.errors import UserError

_CACHE = ".etr_server_arguments.json"
_ASK_TIMEOUT_S = 300.0


def check_arguments(config: SglangConfig) -> None:
    """Raises UserError, with the closest known name, for an argument of `sglang.arguments` that the server does not have.

    The first call takes some ten seconds. The check is skipped when `sglang.arguments` is empty or no server is to be started.
    """
    if config.urls or not config.arguments:
        return
    known = known_arguments(config.python, config.launch)
    for name in names_of(config.arguments):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"sglang.arguments: the server has no argument {name}{hint}")


def names_of(arguments: Iterable[str]) -> Iterator[str]:
    """Names of the options in a list of arguments, without their values: `--x` for `--x value` and for `--x=value`."""
    return (argument.split("=", 1)[0] for argument in arguments if argument.startswith("--"))


@lru_cache(maxsize=8)
def known_arguments(python: str, launch: tuple[str, ...]) -> frozenset[str]:
    """Names in `PYTHON LAUNCH... --help`. Cached in a file of the environment until another SGLang version is installed in it.

    Raises UserError when the interpreter does not exist or does not answer.
    """
    require_interpreter(python)
    environment = Path(python).absolute().parent.parent
    installed = sorted(path.name for path in environment.glob("lib/python*/site-packages/sglang-*.dist-info"))
    key, cache = json.dumps([installed, launch]), environment / _CACHE
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(cache.read_text())
        if installed and found["of"] == key:
            return frozenset(found["arguments"])
    names = _ask(python, launch)
    if installed:
        with contextlib.suppress(OSError):
            part = cache.with_name(f"{_CACHE}.{os.getpid()}")
            part.write_text(json.dumps({"of": key, "arguments": sorted(names)}))
            part.replace(cache)
    return names


def require_interpreter(python: str) -> None:
    """Raises UserError when the interpreter does not exist or is not executable."""
    if not Path(python).is_file():
        raise UserError(
            f"sglang.python: {Path(python).absolute()} does not exist; `bash tools/setup_env.sh --sglang` creates "
            ".venv-sglang in the repository, and relative paths begin where the job is started"
        )
    if not os.access(python, os.X_OK):
        raise UserError(f"sglang.python: {python} is not executable; give a Python interpreter with SGLang installed")


def _ask(python: str, launch: tuple[str, ...]) -> frozenset[str]:
    try:
        reply = subprocess.run([python, *launch, "--help"], capture_output=True, text=True, timeout=_ASK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"sglang.python: {python} could not be asked for the server's arguments: {error}") from error
    # argparse indents arguments by two spaces. Help text follows after two or more spaces, or on a more deeply indented line.
    heads = (re.split(r"\s{2,}", line.strip())[0] for line in reply.stdout.splitlines() if re.match(r"  -", line))
    names = frozenset(name for head in heads for name in re.findall(r"--[a-z0-9][\w-]*", head))
    if reply.returncode or not names:
        said = (reply.stderr.strip().splitlines() or ["it printed no arguments"])[-1]
        raise UserError(f"sglang.python: `{python} {' '.join(launch)} --help` failed: {said}")
    return names
