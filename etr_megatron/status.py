"""How a user's mistake, met by any rank, reaches the terminal as one sentence.

The first rank of a node that meets a `UserError` writes it to the node's status file; the other ranks, whose collectives
then break because their peer has left, see the file and end quietly instead of burying the sentence under tracebacks.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from etr_megatron.errors import RequeueError, UserError

STATUS_VARIABLE = "ETR_STATUS_FILE"
"""Environment variable with the status file's path; set by the launcher, which then also prints the message."""

USER_ERROR_EXIT = 2
"""Exit code for a user's mistake."""

REQUEUE_EXIT = 75
"""Exit code of a run that has saved its state and wants to be started again (EX_TEMPFAIL of sysexits.h)."""


class Reported(NamedTuple):
    """What a rank of this node has reported: the sentence and the exit code that goes with it."""

    message: str
    exit_code: int


def exit_code_of(body: Callable[[], None]) -> int:
    """Run a rank's work; 0, or 2 after a `UserError` of this rank (which is reported) or of another on this node, 75 after a
    `RequeueError`.

    Anything else that is raised passes through with its traceback: it is a defect of ours. Ctrl-C (which the launcher
    and torchrun pass on) ends the process at once, even inside a collective that waits. To be called in the main thread.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        body()
    except UserError as error:
        report_user_error(error)
        return _exit_code(error)
    except Exception:
        reported = _reported()
        if reported is not None:
            return reported.exit_code
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def code_of_printing(main: Callable[[], int]) -> int:
    """The exit code of a command that prints: what `main` returns; 141, as after SIGPIPE, where its reader has left; 2, and a
    sentence, where what it prints goes to a disk that is full. Characters that the output's encoding lacks are spelled out."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        if sys.stdout is not None:  # closed from the start, and print has printed nothing
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except OSError as error:
        # What a file of its own meets has a name, or is a UserError.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None:
            raise
        print(f"error: what is printed cannot be written: {error.strerror}", file=sys.stderr)
        code = USER_ERROR_EXIT
    # The interpreter would flush what is left in the end, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def report_user_error(error: UserError) -> None:
    """Put the error on record, unless a rank of this node was first.

    Under the launcher the sentence goes to its status file only. Under plain torchrun the rank that was first prints it
    to stderr; without either every caller does.
    """
    message = str(error)
    path = _status_file()
    try:
        report = {"exit_code": _exit_code(error), "message": message}
        is_first = path is None or _write_first(path, report)
    except OSError:  # no room for the status file either: the sentence must not be lost
        is_first, path = True, None
    if is_first and (path is None or STATUS_VARIABLE not in os.environ):
        print(f"error: {message}", file=sys.stderr, flush=True)


def read_status(path: Path) -> Reported | None:
    """What the ranks reported to `path`, or None."""
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    return Reported(report["message"], report["exit_code"])


def given_up() -> int | None:
    """2 where a rank of this node has reported a user's mistake; None for a run that goes on or is to be started again."""
    reported = _reported()
    return USER_ERROR_EXIT if reported is not None and reported.exit_code == USER_ERROR_EXIT else None


def _reported() -> Reported | None:
    """What a rank of this node has reported."""
    path = _status_file()
    return None if path is None else read_status(path)


def _exit_code(error: UserError) -> int:
    return REQUEUE_EXIT if isinstance(error, RequeueError) else USER_ERROR_EXIT


def _status_file() -> Path | None:
    if STATUS_VARIABLE in os.environ:
        return Path(os.environ[STATUS_VARIABLE])
    # torchrun gives each rank `<temporary>/attempt_0/<local rank>/error.json`: its grandparent is the node's own.
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return error_file.parents[1] / "etr_status.json" if error_file.name == "error.json" else None


def _write_first(path: Path, status: dict[str, Any]) -> bool:
    """Create `path` with its whole content, or return False because it exists: a hard link does both at once."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(status, file)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True
