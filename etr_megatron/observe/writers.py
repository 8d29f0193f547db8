"""Copies of the metrics rows for TensorBoard and Weights & Biases; metrics.jsonl stays the source of truth."""

from __future__ import annotations

import importlib.util
import math
import uuid
from pathlib import Path
from typing import Any, Protocol

from etr_megatron.config import Config, to_dict
from etr_megatron.errors import UserError
from etr_megatron.observe.metrics import MetricsRow
from etr_megatron.observe.run_directory import RunDirectory
from etr_megatron.platform.files import disk_errors, write_atomically


class Writer(Protocol):
    """Takes each metrics row once."""

    def write(self, row: MetricsRow) -> None:
        """Show the row of the next step."""
        ...

    def close(self) -> None:
        """Flush and close; nothing may be written afterwards."""
        ...


class TensorBoardWriter:
    """One curve per metrics key; times are grouped under `time/`. Skips values that are not finite."""

    def __init__(self, directory: Path, resumed_at: int) -> None:
        """Start an event file; TensorBoard drops older files' steps after `resumed_at` (0: all steps)."""
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory
        with disk_errors(directory):
            self._writer = SummaryWriter(str(directory), purge_step=resumed_at + 1)

    def write(self, row: MetricsRow) -> None:
        """Add the row's numbers and flush, so that a kill loses nothing; raises `UserError` if the disk is full."""
        with disk_errors(self._directory):
            for tag, value in _curves(row).items():
                self._writer.add_scalar(tag, value, row["step"])
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        with disk_errors(self._directory):
            self._writer.close()


class WandbWriter:
    """The same curves in a Weights & Biases project; honors `WANDB_MODE=offline` and the other usual variables.

    A resumed run continues under the id in `wandb_id`. Curves use the key `step` instead of W&B's own counter, which cannot go
    back: the steps after the checkpoint are logged again.
    """

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        """Open (or reopen) the run; raises `UserError` if the package is missing or W&B refuses."""
        require_wandb(config)
        import wandb

        try:
            self._run = wandb.init(
                project=config.observe.wandb_project,
                name=config.run.name,
                id=_stable_id(directory.root / "wandb_id"),
                resume="allow",
                dir=str(directory.root),
                config=to_dict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"observe.wandb_project is {config.observe.wandb_project!r} but W&B cannot be used "
                f"({' '.join(str(error).split())}); run `wandb login`, or set WANDB_MODE=offline or observe.wandb_project=null"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, row: MetricsRow) -> None:
        """Log the row's numbers."""
        self._run.log({**_curves(row), "step": row["step"]})

    def close(self) -> None:
        """Finish the run and wait for pending uploads."""
        self._run.finish()


def require_wandb(config: Config) -> None:
    """Raise `UserError` if W&B is requested and its package is not installed."""
    if config.observe.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"observe.wandb_project is {config.observe.wandb_project!r} but the package wandb is not installed; "
            "`pip install wandb` into .venv, or set observe.wandb_project=null"
        )


def open_writers(config: Config, directory: RunDirectory, resumed_at: int) -> list[Writer]:
    """The writers that `config.observe` asks for; `resumed_at` is the last step kept (0 for a new run)."""
    writers: list[Writer] = []
    if config.observe.wandb_project is not None:
        writers.append(WandbWriter(config, directory))
    if config.observe.tensorboard:
        writers.append(TensorBoardWriter(directory.tensorboard, resumed_at))
    return writers


def _curves(row: MetricsRow) -> dict[str, float]:
    curves: dict[str, Any] = {}
    for key, value in row.items():
        if key == "step" or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        curves[f"time/{key.removeprefix('time_')}" if key.startswith("time_") else key] = value
    return curves


def _stable_id(path: Path) -> str:
    if path.exists():
        return path.read_text().strip()
    new = uuid.uuid4().hex[:8]
    write_atomically(path, f"{new}\n".encode())
    return new
