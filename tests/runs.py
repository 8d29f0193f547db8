"""Starts real runs from tests: small, quick, each in its own directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests import warm

REPO = Path(__file__).resolve().parents[1]
HELD = "reward.function=tests.held:digit_sum_is_even"
TIMES = ("time_rollout", "time_reward", "time_train", "time_sync", "time_step", "tokens_per_s", "tflops_per_gpu")
TIMES += ("time_logprobs", "time_reference", "time_update", "time_checkpoint", "time_checkpoint_write")

SMALL = """
run: {name: small, steps: 6}
tiny: {hidden_size: 32, layers: 2, heads: 4, head_dim: 12, intermediate_size: 72, warm_start_steps: 40}
rollout: {prompts_per_step: 6, samples_per_prompt: 4, max_response_tokens: 24, batch_samples: 8}
train: {minibatches: 3, lr: 1.0e-3, tokens_per_microbatch: 256}
reward: {timeout_s: 60, function: "tests.rewards:digit_sum_is_even"}
eval: {every: 3, problems: 8}
arithmetic: {train_problems: 512, eval_problems: 16}
checkpoint: {every: 3}
observe: {tensorboard: false}
"""


class Runs:
    """Runs of the small config under `folder`, which share one warm-started policy."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.config = folder / "small.yaml"
        self.config.write_text(SMALL)
        self._common = [f"run.dir={folder / 'runs'}", f"tiny.cache_dir={cache}"]

    def command(self, *overrides: str) -> list[str]:
        return [sys.executable, "-m", "etr_megatron.launch", str(self.config), *self._common, *overrides]

    def start(
        self, *overrides: str, prefix: tuple[str, ...] = (), hold: str = "", cold: bool = False, **options: Any
    ) -> subprocess.Popen | warm.Process:
        """cold: as a user starts it, with a command. Otherwise, and without a prefix and options of Popen, it starts warm."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HOLD": hold}
        command, pipe = [*prefix, *self.command(*overrides)], subprocess.PIPE
        if cold or prefix or options:
            return subprocess.Popen(command, cwd=REPO, env=env, stdout=pipe, stderr=pipe, text=True, **options)
        return warm.start(command, env)

    def held(self, point: str, *overrides: str, **options: Any) -> subprocess.Popen | warm.Process:
        """A run that is held at this point, see tests/held.py; returns when it is there."""
        (self.folder / "held").unlink(missing_ok=True)  # of an earlier one
        process = self.start(HELD, *overrides, hold=self.hold(point), **options)
        wait_for(lambda: self.is_held or process.poll() is not None)
        assert self.is_held, process.communicate()
        return process

    def hold(self, point: str) -> str:
        """The environment's HOLD."""
        return f"{point} {self.folder / 'held'}"

    @property
    def is_held(self) -> bool:
        return (self.folder / "held").exists()

    def let_go(self) -> None:
        (self.folder / "held.over").touch()

    def finish(self, *overrides: str, deadline_s: float = 900.0, **options: Any) -> tuple[int, str]:
        """Exit code and everything printed."""
        process = self.start(*overrides, **options)
        try:
            out, err = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, out + err

    def directory(self, name: str) -> Path:
        return self.folder / "runs" / name

    def rows(self, name: str, *, times: bool = False) -> list[dict[str, Any]]:
        file = self.directory(name) / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return rows if times else [{key: row[key] for key in row if key not in TIMES} for row in rows]

    def saved_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of steps up to the last checkpoint, including times: a resumed run must not train these again."""
        saves = (self.directory(name) / "checkpoints").glob("step_*/trainer.json")
        last = max((int(save.parent.name.removeprefix("step_")) for save in saves), default=0)
        return [row for row in self.rows(name, times=True) if row["step"] <= last]

    def assert_went_on(self, name: str, saved: list[dict[str, Any]]) -> None:
        """Compare times as well: a run is deterministic, so equal metrics alone do not show that it resumed."""
        assert saved and self.rows(name, times=True)[: len(saved)] == saved


def rank_of(launcher: int, rank: int) -> int:
    """The process id of a rank. One that started warm is called so; the environment of another is in /proc."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with suppress(OSError):  # it has ended
            is_warm = Path(f"/proc/{child}/comm").read_text() == f"rank {rank}\n"
            if is_warm or f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return int(child)
    raise AssertionError(f"rank {rank} is not there")


def gone(pid: int) -> bool:
    """Whether the process has ended; of a zombie, only the parent does not know it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], bool], deadline_s: float = 600.0, poll_s: float = 0.02) -> None:
    """A deadline is for tests that fail; what is waited for may take many times its usual time on a busy machine."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the condition did not come true in time")
        time.sleep(poll_s)
