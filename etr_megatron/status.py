"""How a user's mistake, met by any rank, reaches the terminal as one sentence.

The first rank of a node that meets a `UserError` writes it to the node's status file; the other ranks, whose collectives
then break because their peer has left, see the file and end quietly instead of burying the sentence under tracebacks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from etr_megatron.errors import UserError

STATUS_VARIABLE = "ETR_STATUS_FILE"
"""Environment variable with the status file's path; set by the launcher, which then also prints the message."""

USER_ERROR_EXIT = 2
"""Exit code for a user's mistake."""


def exit_code_of(body: Callable[[], None]) -> int:
    """Run a rank's work; 0, or 2 after a `UserError` of this rank (which is reported) or of another on this node.

    Anything else that is raised passes through with its traceback: it is a defect of ours. Ctrl-C (which the launcher
    and torchrun pass on) ends the process at once, even inside a collective that waits. To be called in the main thread.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        body()
    except UserError as error:
        report_user_error(error)
        return USER_ERROR_EXIT
    except Exception:
        if user_error_reported():
            return USER_ERROR_EXIT
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def report_user_error(error: UserError) -> None:
    """Put the error on record, unless a rank of this node was first.

    Under the launcher the sentence goes to its status file only. Under plain torchrun the rank that was first prints it
    to stderr; without either every caller does.
    """
    message = str(error)
    path = _status_file()
    try:
        is_first = path is None or _write_first(path, {"status": "user_error", "message": message})
    except OSError:  # no room for the status file either: the sentence must not be lost
        is_first, path = True, None
    if is_first and (path is None or STATUS_VARIABLE not in os.environ):
        print(f"error: {message}", file=sys.stderr, flush=True)


def user_error_reported() -> bool:
    """Whether a rank of this node has reported a user's mistake."""
    path = _status_file()
    return path is not None and read_status(path) is not None


def read_status(path: Path) -> str | None:
    """The message of the user's mistake that the ranks reported to `path`, or None."""
    if not path.exists():
        return None
    status: dict[str, str] = json.loads(path.read_text())
    return status["message"] if status["status"] == "user_error" else None


def _status_file() -> Path | None:
    if STATUS_VARIABLE in os.environ:
        return Path(os.environ[STATUS_VARIABLE])
    # torchrun gives each rank `<temporary>/attempt_0/<local rank>/error.json`: its grandparent is the node's own.
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return error_file.parents[1] / "etr_status.json" if error_file.name == "error.json" else None


def _write_first(path: Path, status: dict[str, str]) -> bool:
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
