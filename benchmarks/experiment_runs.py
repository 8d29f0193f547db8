"""The runs of an experiment: lists them, starts missing ones in parallel, and reports how they ended."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from etr_megatron.config import Config, load_config, resolve, to_dict
from etr_megatron.errors import UserError
from etr_megatron.observe import MetricsLog, MetricsRow
from etr_megatron.platform.files import write_atomically

REPO = Path(__file__).resolve().parents[1]
CONFIG = Path("configs") / "cpu_tiny.yaml"

_POLL_S = 0.2
_STOP_S = 10.0
_LAST_LINES = 15
# Ranks end with their launcher; this ends the launcher with this process, even after `kill -9`.
_LAUNCH = """
import sys
from etr_megatron.platform.lifetime import die_with_parent
die_with_parent(int(sys.argv[1]))
from etr_megatron.launch import main
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Run:
    """One preset under one seed."""

    preset: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.preset}-seed{self.seed}"


@dataclass(frozen=True)
class Failure:
    """A run that did not reach its last step, and the end of its output."""

    run: Run
    exit_code: int
    last_lines: str


@dataclass(frozen=True)
class Experiment:
    """Runs that differ only in `objective.preset` and `run.seed`, in one directory.

    <runs_dir>/experiment.json      the settings that all runs share, and the environments that they ran in
    <runs_dir>/<preset>-seed<n>/    a run directory of etr_megatron
    <runs_dir>/<preset>-seed<n>.log output of the run's latest start
    """

    runs_dir: Path
    steps: int
    overrides: tuple[str, ...] = ()

    def arguments(self, run: Run) -> list[str]:
        """The run's config overrides."""
        fixed = [f"run.name={run.name}", f"run.dir={self.runs_dir}", f"run.seed={run.seed}", f"run.steps={self.steps}"]
        return [*self.overrides, *fixed, f"objective.preset={run.preset}"]

    def config(self, run: Run) -> Config:
        """The run's config as loaded; raises `UserError` with everything that is wrong with it for one process."""
        config = load_config(REPO / CONFIG, self.arguments(run))
        resolve(config, 1, cuda=False)
        return config

    def rows(self, run: Run) -> list[MetricsRow]:
        """The run's metrics so far, oldest first."""
        return MetricsLog(self.runs_dir / run.name / "metrics.jsonl").rows()

    def is_finished(self, run: Run) -> bool:
        """Whether the last step has its row."""
        rows = self.rows(run)
        return bool(rows) and rows[-1]["step"] >= self.steps

    def log(self, run: Run) -> Path:
        """File of the run's output."""
        return self.runs_dir / f"{run.name}.log"

    def start(self, run: Run) -> subprocess.Popen[bytes]:
        """Start the run from its newest checkpoint, or from the beginning, in one process with one thread."""
        command = [sys.executable, "-c", _LAUNCH, str(os.getpid()), "--nproc", "1", str(CONFIG), *self.arguments(run)]
        with self.log(run).open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=REPO,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to this process only, which then stops its runs in order
            )


def shared_settings(config: Config) -> dict[str, Any]:
    """`section.key` -> value of the settings that all runs share and that affect their results.

    config: the config of any run, as loaded: values that the preset decides are null, and `auto` is not resolved.
    """
    own = {"run.name", "run.dir", "run.seed", "run.phase_timeout_s", "objective.preset", "tiny.cache_dir", "reward.workers"}
    return {
        f"{section}.{key}": value
        for section, values in to_dict(config).items()
        if section not in ("checkpoint", "observe")
        for key, value in values.items()
        if f"{section}.{key}" not in own
    }


def read_record(runs_dir: Path) -> dict[str, Any] | None:
    """experiment.json of `runs_dir`: `settings` and `environments`; None if there is no experiment yet."""
    file = runs_dir / "experiment.json"
    if not file.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); restore it, or give another --runs-dir") from error
    return record


def keep_record(runs_dir: Path, settings: dict[str, Any], environment: dict[str, Any]) -> None:
    """Write or extend experiment.json; a start on another machine or version is added to `environments`.

    Raises `UserError` if the directory holds runs under other settings, whose results are not comparable.
    """
    record = read_record(runs_dir) or {"settings": settings, "environments": []}
    before = record["settings"]
    changed = [
        f"{key}={before[key]!r}, not {settings[key]!r}" for key in settings if key in before and before[key] != settings[key]
    ]
    if changed:
        raise UserError(
            f"--runs-dir {runs_dir} holds runs made with {'; '.join(changed)}: name another directory or set that again"
        )

    def same(one: dict[str, Any]) -> bool:
        return all(one.get(key) == value for key, value in environment.items() if key != "date")

    if not any(same(one) for one in record["environments"]):
        record["environments"].append(environment)
    write_atomically(runs_dir / "experiment.json", (json.dumps(record, indent=2) + "\n").encode())


@contextmanager
def only_user(runs_dir: Path) -> Iterator[None]:
    """Lock the directory: a second experiment in it would start the same runs again. Raises `UserError` if it is locked."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        lock = (runs_dir / ".lock").open("a")
    except OSError as error:
        raise UserError(f"--runs-dir {runs_dir} cannot be written ({error.strerror}): name another directory") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--runs-dir {runs_dir} is in use by another experiment: wait for it or name another") from None
        yield


def run_all(experiment: Experiment, todo: Sequence[Run], jobs: int, say: Callable[[str], None]) -> list[Failure]:
    """Run `todo`, `jobs` at a time and in this order; returns those that failed.

    No run outlives this call, however it ends. Call it in the main thread: it handles SIGTERM like Ctrl-C.
    """
    waiting, running = deque(todo), dict[Run, tuple[subprocess.Popen[bytes], float]]()
    failures: list[Failure] = []
    began, ended = time.monotonic(), 0
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                running[run] = (experiment.start(run), time.monotonic())
            time.sleep(_POLL_S)
            for run, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                ended += 1
                now = time.monotonic()
                left = (now - began) / ended * (len(todo) - ended)
                failure = _failure(experiment, run, process.returncode)
                if failure is not None:
                    failures.append(failure)
                outcome = "finished" if failure is None else f"FAILED with exit code {failure.exit_code}"
                say(f"[{ended}/{len(todo)}] {run.name} {outcome} after {now - started:.0f} s, about {left / 60:.0f} min left")
    finally:
        _stop([process for process, _ in running.values()])
        signal.signal(signal.SIGTERM, before)
    return failures


def _leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _failure(experiment: Experiment, run: Run, exit_code: int) -> Failure | None:
    if exit_code == 0 and experiment.is_finished(run):
        return None
    lines = experiment.log(run).read_text(errors="replace").splitlines()
    return Failure(run, exit_code, "\n".join(lines[-_LAST_LINES:]))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop the launchers, first by SIGTERM, which they pass on to their ranks; ranks end with their launcher in any case."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
