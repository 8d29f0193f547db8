"""Saving and resuming a run."""

import etr_megatron.policy  # noqa: F401  (its import makes megatron.core importable without a GPU)
from etr_megatron.checkpoint.checkpoint import latest_step, load, save, saved_steps
from etr_megatron.checkpoint.saver import Saver

__all__ = ["Saver", "latest_step", "load", "save", "saved_steps"]
