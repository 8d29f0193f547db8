"""Keeps a server from outliving the job: `python watchdog.py GRACE_S FD COMMAND...`, stdin a pipe that the job holds open.

The server runs in a session of its own, so that everything it starts can be killed as one process group; its schedulers would
otherwise survive it. When the pipe closes (the kernel closes it even after `kill -9` of the job), the group gets SIGTERM and,
after GRACE_S seconds, SIGKILL. When the server ends first, the rest of the group is ended in the same way, and the server's
exit code is passed on. The server's pid is written to file descriptor FD, so that the job can end the group if the watchdog
itself is killed; the server then gets SIGKILL (on Linux). Uses only the standard library; imports nothing of this package.

SGLang (0.5.21) always leaves a file with its load in /dev/shm. Its name is random and does not identify the server. So the
watchdog notes which of these files the server's processes have open, and removes them at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

LEFT_BEHIND = "/dev/shm/sglang_loads_"
"""Beginning of the names of files that SGLang leaves, see `shm_path_for` in its load_snapshot.py."""

_POLL_S = 0.2
_SCAN_S, _MAX_SCAN_S = 1.0, 60.0
"""Intervals between looks for a server's file, which double: not all servers have one."""
_PR_SET_PDEATHSIG = 1


def _signal_group(group: int, number: int) -> bool:
    """Signal the group; returns whether it still has processes."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def files_of(group: int) -> set[str]:
    """Files of `LEFT_BEHIND` that processes of the group have open. Empty on systems without Linux's /proc."""
    found: set[str] = set()
    try:
        processes = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:  # no /proc: macOS, or a sandbox
        return found
    for name in processes:
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.getpgid(int(name)) != group:
                continue
            for descriptor in os.listdir(f"/proc/{name}/fd"):
                with contextlib.suppress(OSError):  # closed meanwhile
                    found.add(os.readlink(f"/proc/{name}/fd/{descriptor}"))
    return {file for file in found if file.startswith(LEFT_BEHIND)}


def remove(files: Iterable[str]) -> None:
    """Remove files, once the processes that had them open have ended."""
    for file in files:
        with contextlib.suppress(OSError):
            os.unlink(file)


def _end_group(server: subprocess.Popen[bytes], grace_s: float) -> None:
    """Send SIGTERM, then SIGKILL, and wait until the group has no process: schedulers hold GPU memory until they end."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s / 2)):
        deadline = time.monotonic() + wait_s
        _signal_group(server.pid, number)
        while time.monotonic() < deadline:
            server.poll()  # a zombie would count as a member of the group
            if not _signal_group(server.pid, 0):
                return
            time.sleep(_POLL_S)


def main() -> int:
    """Run the server until it ends or the pipe closes."""
    grace_s, report, command = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    # Signals to the job's terminal or session are for the job to handle; if it ends, the pipe closes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_prepare)
        files: set[str] = set()
        stack.callback(remove, files)  # runs last
        stack.callback(_end_group, server, grace_s)
        stack.callback(lambda: files.update(files_of(server.pid)))
        os.write(report, str(server.pid).encode())
        os.close(report)
        look, interval = time.monotonic(), _SCAN_S
        while server.poll() is None:
            if not files and time.monotonic() >= look:  # while it runs: a server that has died has no open files to look up
                files |= files_of(server.pid)
                look, interval = time.monotonic() + interval, min(2 * interval, _MAX_SCAN_S)
            ready, _, _ = select.select([sys.stdin.buffer], [], [], _POLL_S)
            if ready and not os.read(sys.stdin.fileno(), 1):
                return 0
        return server.returncode


def _prepare() -> None:
    """Runs in the server's process before exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
