"""The lock of a run directory: one process at a time, and a process that was killed leaves none behind."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from etr_megatron.errors import UserError
from etr_megatron.observe import RunDirectory, run_lock
from tests.runs import REPO

pytestmark = pytest.mark.usefixtures("deadline", "no_patience")


@pytest.fixture
def no_patience(monkeypatch) -> float:
    """Locks that are held are asked for once; returns the patience that runs have."""
    usual = run_lock.PATIENCE_S
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.0)
    return usual


HOLDER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from etr_megatron.observe.run_lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2] == "forks":
        if os.fork() == 0:
            print(os.getpid(), flush=True)  # by itself, when it has let go
            time.sleep(600)
            os._exit(0)
    else:
        print(subprocess.Popen(["sleep", "600"], close_fds=False).pid, flush=True)
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
            with pytest.raises(UserError, match="another process is running in"), directory.locked():
                pass
            holder.kill()
            holder.wait()
            with directory.locked():
                os.kill(child, 0)  # still alive
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_a_lock_that_is_held_is_asked_for_again_for_some_seconds(tmp_path, monkeypatch, no_patience) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", no_patience)
    slept, clock, directory = [], iter(range(100)), RunDirectory(tmp_path / "run")
    monkeypatch.setattr(run_lock.time, "monotonic", lambda: next(clock))
    with ExitStack() as held:
        held.enter_context(directory.locked())

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                held.close()  # as the kernel does, some time after a process is killed

        monkeypatch.setattr(run_lock.time, "sleep", sleep)
        with directory.locked():
            pass
    assert slept == [run_lock._PAUSE_S] * 3 and run_lock._PAUSE_S > 0


def test_children_that_are_forked_close_the_lock_and_nothing_else(tmp_path: Path) -> None:
    def later_file_is_open_in_a_child() -> bool:
        file = os.open(tmp_path, os.O_RDONLY)  # gets the lowest free descriptor: the lock's, if that is closed
        try:
            child = os.fork()
            if child == 0:
                with suppress(OSError):
                    os._exit(0 if os.fstat(file) else 1)
                os._exit(1)
            return os.waitpid(child, 0)[1] == 0
        finally:
            os.close(file)

    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        child = os.fork()
        if child == 0:
            with suppress(OSError):
                os._exit(0 if later_file_is_open_in_a_child() else 1)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert later_file_is_open_in_a_child()


def test_a_lock_is_free_where_nobody_holds_it_and_others_may_ask_at_the_same_time(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    assert not run_lock.is_free(directory.lock_file)  # no lock file exists
    with directory.locked():
        assert not run_lock.is_free(directory.lock_file)
    descriptors = len(os.listdir("/proc/self/fd"))
    with directory.lock_file.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert run_lock.is_free(directory.lock_file)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with directory.locked():
        pass


def test_a_run_directory_has_one_process_at_a_time(tmp_path: Path) -> None:
    one, other = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    second = RunDirectory(tmp_path / "more" / "second")
    with one.locked(), second.locked(), pytest.raises(UserError) as caught, other.locked():
        pass
    assert str(caught.value) == (
        f"another process is running in {tmp_path}/run; wait for it, stop it, or choose another run.name"
    )
    with other.locked():
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
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
    RunDirectory(tmp_path / "run").lock_file.mkdir(parents=True)
    with pytest.raises(UserError, match=r"run/lock: cannot be written"), RunDirectory(tmp_path / "run").locked():
        pass


def test_what_else_a_file_system_says_of_a_lock_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), RunDirectory(tmp_path / "run").locked():
        pass
