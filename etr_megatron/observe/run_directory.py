"""`runs/<name>/`: everything that a run writes."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from etr_megatron.config import Config, dump_yaml, to_dict
from etr_megatron.errors import UserError
from etr_megatron.observe import run_lock
from etr_megatron.observe.metrics import MetricsLog
from etr_megatron.observe.rollouts import remove_rollouts_after, save_rollouts
from etr_megatron.platform.files import disk_errors, entries, path_errors, write_atomically
from etr_megatron.types import Group

logger = logging.getLogger(__name__)

RunState = Literal["running", "finished", "failed", "requeue"]

_KEPT_CONFIG = re.compile(r"config\.step_(\d{6,})\.yaml")

FREE_TO_CHANGE: tuple[str, ...] = (
    "run.name",
    "run.dir",
    "run.steps",
    "run.phase_timeout_s",
    "run.stop_grace_s",
    "environment.workers",
    "environment.concurrency",
    "reward.workers",
    "reward.concurrency",
    "eval.every",
    "checkpoint.",
    "observe.",
    "sglang.",
    "rollout.record",
    "rollout.only",
)
"""Keys (or, ending in a dot, sections) that may change between start and resume without changing the experiment."""
_NOT_FREE = ("sglang.fp8", "checkpoint.keep_best", "checkpoint.best_by")
"""Exceptions: keys of these sections that do change the experiment, or which of its checkpoints are kept."""


class RunDirectory:
    """The files of one run; one process (rank 0) writes them.

        directory = RunDirectory(Path(config.run.dir) / config.run.name)
        with directory.locked():
            directory.prepare(config)
            directory.truncate_after(step=25)  # on resume
            directory.continue_with(config, step=25)

    config.yaml       the resolved configuration of the last start
    config.step_*.yaml  the configuration of an earlier start with other settings, up to this step
    metrics.jsonl     one object per step (`MetricsLog`)
    rollouts/         samples to read, one file per saved step
    evaluations/      responses to held-out problems to read, one file per evaluation
    recorded/         all groups of every step, for replay; owned by the rollout package
    checkpoints/      owned by the checkpoint package
    tensorboard/      event files, made from the same rows as metrics.jsonl
    profiles/         PyTorch traces of updates; each profiled rank writes its own
    servers/          output of the rollout servers
    lock              empty; locked while the run is in progress
    status.json       the run's state (running, finished, failed or requeue, which means start it again) and step
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_file = root / "config.yaml"
        self.metrics = MetricsLog(root / "metrics.jsonl")
        self.rollouts = root / "rollouts"
        self.evaluations = root / "evaluations"
        self.recorded = root / "recorded"
        self.reached_file = self.recorded / "reached.safetensors"
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tensorboard"
        self.profiles = root / "profiles"
        self.servers = root / "servers"
        self.status_file = root / "status.json"
        self.lock_file = root / "lock"

    def locked(self) -> AbstractContextManager[None]:
        """Keep every other process from running here; raises as `run_lock.locked`."""
        return run_lock.locked(self.lock_file)

    def is_used(self) -> bool:
        """Whether a run has written results here."""
        metrics = self.metrics.path
        if metrics.exists() and metrics.stat().st_size > 0:
            return True
        return any(folder.is_dir() and any(folder.iterdir()) for folder in (self.rollouts, self.checkpoints))

    def refuse_if_used(self, resume: bool, *, only_records: bool = False) -> None:
        """Raise `UserError` if this run must not use the directory.

        - It has results, and without `checkpoint.resume` the run would mix its own with them.
        - It has results that training would remove.
        - It has a finished run, but no checkpoint to resume.
        - It cannot be read.

        only_records: the run does not train (`rollout.only`), and continues after what such a run has recorded.
        """
        with disk_errors(self.root):
            is_used, is_recorded = self.is_used(), self.reached_file.exists()
            is_over = self.read_state() == "finished" and not entries(self.checkpoints, "step_*") and not is_recorded
        if not resume and is_used:
            raise UserError(
                f"{self.root} holds an earlier run and checkpoint.resume is false; choose another run.name, remove the "
                "directory, or set checkpoint.resume=true to continue it"
            )
        if is_recorded and not only_records:
            raise UserError(
                f"{self.recorded} holds steps recorded by --rollout-only, which training there would remove; move it "
                "elsewhere, or choose another run.name"
            )
        if is_over:
            raise UserError(
                f"{self.root} holds a finished run without a checkpoint to continue from; choose another run.name or remove "
                "the directory"
            )

    def refuse_if_unwritable(self) -> None:
        """Raise `UserError` if the directory cannot be created or written, or has files that this user may not use.

        Leaves nothing new behind.
        """
        with disk_errors(self.root):
            missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
            try:
                for path in reversed(missing):
                    path.mkdir(exist_ok=True)
                if not os.access(self.root, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.root))
            finally:
                for path in missing:
                    with suppress(OSError):  # not created, or already in use by another process
                        path.rmdir()
        self._refuse_other_users_files()

    def _refuse_other_users_files(self) -> None:
        """Refuse files that another user, or root in a container, has left in a world-writable directory: the run would fail
        later, at the step that needs them, such as the first checkpoint."""
        for folder in (
            self.rollouts,
            self.evaluations,
            self.recorded,
            self.checkpoints,
            self.tensorboard,
            self.profiles,
            self.servers,
        ):
            _require(folder, os.R_OK | os.W_OK | os.X_OK)
        steps = entries(self.checkpoints, "step_*")
        for folder in steps:  # each will be removed eventually
            _require(folder, os.R_OK | os.W_OK | os.X_OK)
        _require(self.lock_file, os.R_OK | os.W_OK)
        configs = (self.config_file, *self._kept_configs())
        for file in (*configs, self.metrics.path, self.status_file, *entries(self.recorded, "*.safetensors")):
            _require(file, os.R_OK)
        for file in (file for folder in steps for file in entries(folder, "*")):
            _require(file, os.R_OK)

    @path_errors()
    def prepare(self, config: Config) -> list[str]:
        """Create the directories and, unless the run is resumed, config.yaml.

        Warns of keys that differ from the last start and may affect the results (see `FREE_TO_CHANGE`), and returns them.

        On a resume, `continue_with` writes config.yaml, once the checkpoint is known to fit `config`.
        Raises `UserError` if the directory is used and resuming is off, if it cannot be written, or if the disk is full.
        """
        self.refuse_if_used(config.checkpoint.resume, only_records=config.rollout.only)
        for folder in (self.root, self.rollouts, self.checkpoints):
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        is_resumed = self.is_used() and self.config_file.exists()
        if not is_resumed:
            write_atomically(self.config_file, dump_yaml(config).encode())
            return []
        changes = _changed_keys(_read_config(self.config_file), to_dict(config))
        if changes:
            said = "; ".join(f"{key} ({change})" for key, change in changes.items())
            logger.warning("%s: resuming with settings that differ from its last start: %s", self.root, said)
        return list(changes)

    @path_errors()
    def continue_with(self, config: Config, step: int) -> None:
        """Write config.yaml for a start that continues after `step` (0: a new run).

        If the settings up to `step` differ in a way that may affect the results, they are kept as config.step_<step>.yaml.
        """
        kept = self.root / f"config.step_{step:06d}.yaml"
        later = {file: until for file, until in self._kept_configs().items() if until >= step}
        former = min(later, key=later.__getitem__, default=self.config_file)  # the settings of the step itself
        if step and former.exists() and _changed_keys(_read_config(former), to_dict(config)):
            write_atomically(kept, former.read_bytes())
            later.pop(kept, None)
        write_atomically(self.config_file, dump_yaml(config).encode())
        for file in later:
            file.unlink()

    def _kept_configs(self) -> dict[Path, int]:
        """The configs of earlier starts, and the last step of each."""
        matches = {file: _KEPT_CONFIG.fullmatch(file.name) for file in entries(self.root, "config.step_*.yaml")}
        return {file: int(match[1]) for file, match in matches.items() if match}

    def save_rollouts(self, step: int, groups: Iterable[Group]) -> Path:
        """Write the samples of `groups` to `rollouts/step_<step>.jsonl` and return its path."""
        return save_rollouts(self.rollouts, step, groups)

    def save_evaluation(self, step: int, groups: Iterable[Group]) -> Path:
        """Like `save_rollouts`, for responses to held-out problems after `step` (0: before the first), in `evaluations/`."""
        with disk_errors(self.evaluations):
            self.evaluations.mkdir(exist_ok=True)
        return save_rollouts(self.evaluations, step, groups)

    def truncate_after(self, step: int) -> None:
        """Remove metrics and rollouts of steps after `step`, the checkpoint's (0: a new run).

        Raises `UserError` if one of them is not a file or cannot be read.
        """
        with path_errors():
            self.metrics.truncate_after(step)
            for folder in (self.rollouts, self.evaluations, self.recorded):
                remove_rollouts_after(folder, step)

    def write_status(self, state: RunState, step: int, steps: int, message: str | None = None) -> None:
        """Replace status.json: the state, the last finished step of `steps`, and the reason for "failed" and "requeue"."""
        status = {"state": state, "step": step, "steps": steps, "message": message, "pid": os.getpid()}
        status["updated_at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_atomically(self.status_file, (json.dumps(status, indent=2) + "\n").encode())

    def read_state(self) -> str | None:
        """The state in status.json, None without that file, or "interrupted" if it is "running" but the process is gone.

        Raises UserError if the file has no state.
        """
        if not self.status_file.exists():
            return None
        try:
            state = str(json.loads(self.status_file.read_text())["state"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.status_file} does not hold a run's state ({error}); remove it") from error
        return "interrupted" if state == "running" and run_lock.is_free(self.lock_file) else state


def _require(path: Path, mode: int) -> None:
    """Raise UserError if an existing path does not allow this access (see `os.access`)."""
    if path.exists() and not os.access(path, mode):
        what = "written" if mode & os.W_OK else "read"
        raise UserError(f"{path}: cannot be {what} (Permission denied); choose another run.dir or run.name")


def _read_config(file: Path) -> dict[str, Any]:
    """The keys of a config by section, also of one that another version wrote."""
    try:
        loaded = yaml.safe_load(file.read_bytes())  # bytes: YAML detects the encoding itself
    except yaml.YAMLError as error:
        place = " ".join(str(error).split())
        raise UserError(f"{file}: not YAML ({place}); restore it or remove it") from error
    if not isinstance(loaded, dict) or not all(isinstance(section, dict) for section in loaded.values()):
        raise UserError(f"{file}: not a configuration; restore it or remove it")
    return loaded


def _changed_keys(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Key -> "old -> new" for every key that matters and differs; ignores keys that only one version knows."""
    old, new = _flat(before), _flat(now)
    return {
        key: f"{old[key]!r} -> {new[key]!r}"
        for key in new
        if key in old and old[key] != new[key] and (key in _NOT_FREE or not key.startswith(FREE_TO_CHANGE))
    }


def _flat(tree: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
