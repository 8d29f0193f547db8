"""The records of a run: the run directory, metrics, readable rollouts, curves, progress, the report."""

from __future__ import annotations

from etr_megatron.observe.metrics import METRIC_KEYS, OPTIONAL_METRIC_KEYS, MetricsLog, MetricsRow, StepMetrics
from etr_megatron.observe.profile import profiled
from etr_megatron.observe.progress import Progress
from etr_megatron.observe.recorder import Recorder
from etr_megatron.observe.rollouts import save_rollouts
from etr_megatron.observe.run_directory import RunDirectory
from etr_megatron.observe.stopwatch import StepTimes, Stopwatch
from etr_megatron.observe.writers import TensorBoardWriter, WandbWriter, require_wandb

__all__ = [
    "METRIC_KEYS",
    "OPTIONAL_METRIC_KEYS",
    "MetricsLog",
    "MetricsRow",
    "Progress",
    "Recorder",
    "RunDirectory",
    "StepMetrics",
    "StepTimes",
    "Stopwatch",
    "TensorBoardWriter",
    "WandbWriter",
    "profiled",
    "require_wandb",
    "save_rollouts",
]
