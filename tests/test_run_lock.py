"""The lock of a run directory: one process at a time, and none is left of one that was killed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from etr_megatron.errors import UserError
from etr_megatron.observe import RunDirectory
from tests.runs import REPO

HOLDER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from etr_megatron.observe.run_lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2] == "forks":
        if os.fork() == 0:
            print(os.getpid(), flush=True)  # by itself, when it has let go
            time.sleep(60)
            os._exit(0)
    else:
        print(subprocess.Popen(["sleep", "60"], close_fds=False).pid, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("way", ["forks", "starts"])
def test_the_lock_of_a_killed_process_is_free_though_its_child_lives_on(tmp_path: Path, way: str) -> None:
    directory = RunDirectory(tmp_path / "run")
    command = [sys.executable, "-c", HOLDER, str(directory.lock_file), way]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match="another process is running in"), directory.locked(patience_s=0):
                pass
            holder.kill()
            holder.wait()
            with directory.locked(patience_s=0):
                os.kill(child, 0)  # it does live
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_a_run_directory_has_one_process_at_a_time(tmp_path: Path) -> None:
    one, other = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    second = RunDirectory(tmp_path / "second")
    with one.locked(), second.locked(), pytest.raises(UserError) as caught, other.locked(patience_s=0.2):
        pass
    assert str(caught.value) == (
        f"another process is running in {tmp_path}/run; wait for it, stop it, or choose another run.name"
    )
    with other.locked(patience_s=0):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_only_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING"), RunDirectory(tmp_path / "run").locked():
        pass
    assert "its file system has no locks" in caplog.text and f"{tmp_path}/run" in caplog.text


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written"), RunDirectory(tmp_path / "file" / "run").locked():
        pass
