"""Report a user error on any rank to the terminal as a single message.

The first rank of a node that raises a `UserError` writes it to the node's status file. The other ranks, whose collectives
then fail because their peer has left, see the file and exit quietly instead of burying the message under tracebacks.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from etr_megatron.errors import RequeueError, UserError

STATUS_VARIABLE = "ETR_STATUS_FILE"
"""Environment variable with the status file's path; set by the launcher, which then prints the message."""

USER_ERROR_EXIT = 2
"""Exit code for a user error."""

SIGNAL_DELAY_S = 1.0
"""Longest time in seconds between the first and the last rank's signal: torchrun forwards it to one rank after the other."""

REQUEUE_EXIT = 75
"""Exit code of a run that should be restarted and then resumes from its last checkpoint (EX_TEMPFAIL of sysexits.h)."""


class Reported(NamedTuple):
    """A report by a rank of this node: the message and its exit code."""

    message: str
    exit_code: int


def exit_code_of(body: Callable[[], int | None]) -> int:
    """Run a rank's work and return its exit code. Must be called from the main thread. The code is:

    - the result of `body`, 0 for None
    - 2 after a `UserError` on this rank, which is reported, or on another rank of this node
    - 75 likewise after a `RequeueError`

    Any other exception is a bug and propagates with its traceback. Ctrl-C (which the launcher and torchrun forward) ends the
    process at once, even inside a blocked collective.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return body() or 0
    except UserError as error:
        report_user_error(error)
        return _exit_code(error)
    except Exception:
        reported = _reported()
        if reported is not None:
            return reported.exit_code
        # The error may come from a peer that Ctrl-C has ended. Then this rank's own signal arrives within this time, and ends
        # it without a traceback.
        time.sleep(SIGNAL_DELAY_S)
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def run_cli(main: Callable[[], int]) -> int:
    """Run a command that prints, and return its exit code: the code of `main`; 141, as after SIGPIPE, if the reader has closed
    the pipe; 2, with a message, if stdout goes to a full disk. Escapes characters that are not in stdout's encoding."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        if sys.stdout is not None:  # None if it was closed from the start; print then does nothing
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except OSError as error:
        # An error on a file that `main` opened has a filename, or is a UserError.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None:
            raise
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        code = USER_ERROR_EXIT
    # Otherwise the interpreter would try to flush the rest at exit, and print an error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code; with 1 and a traceback after an exception.

    Skips the interpreter's shutdown, which aborts while threads of torch.distributed or pyarrow are running, and waits for
    ranks that are in a collective.
    """
    code = 1
    try:
        code = main()
    except SystemExit as leaving:  # raised by argparse after --help
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        with suppress(Exception):  # stderr is full, closed or None
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def report_user_error(error: UserError) -> None:
    """Report the error, unless another rank of this node has done so.

    Under the launcher the message goes to the status file only. Under plain torchrun the first rank prints it to stderr;
    without either, every caller does.
    """
    message = str(error)
    path = _status_file()
    try:
        report = {"exit_code": _exit_code(error), "message": message}
        is_first = path is None or _write_first(path, report)
    except OSError:  # no room for the status file either: the message must not be lost
        is_first, path = True, None
    if is_first and (path is None or STATUS_VARIABLE not in os.environ):
        print(f"error: {message}", file=sys.stderr, flush=True)


def read_status(path: Path) -> Reported | None:
    """The report in `path`, or None."""
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    return Reported(report["message"], report["exit_code"])


def given_up() -> int | None:
    """2 if a rank of this node has reported a user error; None if the run continues or should be restarted."""
    reported = _reported()
    return USER_ERROR_EXIT if reported is not None and reported.exit_code == USER_ERROR_EXIT else None


def _reported() -> Reported | None:
    """The report of this node, or None."""
    path = _status_file()
    return None if path is None else read_status(path)


def _exit_code(error: UserError) -> int:
    return REQUEUE_EXIT if isinstance(error, RequeueError) else USER_ERROR_EXIT


def _status_file() -> Path | None:
    if STATUS_VARIABLE in os.environ:
        return Path(os.environ[STATUS_VARIABLE])
    # torchrun gives each rank `<temporary>/attempt_0/<local rank>/error.json`; the grandparent is common to the node.
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return error_file.parents[1] / "etr_status.json" if error_file.name == "error.json" else None


def _write_first(path: Path, status: dict[str, Any]) -> bool:
    """Create `path` with its content, or return False if it exists; a hard link does both atomically."""
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
