"""The records of a run: the run directory, metrics, readable rollouts, curves, progress, the report."""

from __future__ import annotations

from etr_megatron.observe.metrics import METRIC_KEYS, MetricsLog, MetricsRow
from etr_megatron.observe.profile import profiled
from etr_megatron.observe.recorder import Recorder
from etr_megatron.observe.run_directory import RunDirectory
from etr_megatron.observe.stopwatch import Stopwatch
from etr_megatron.observe.writers import require_wandb

__all__ = ["METRIC_KEYS", "MetricsLog", "MetricsRow", "Recorder", "RunDirectory", "Stopwatch", "profiled", "require_wandb"]
