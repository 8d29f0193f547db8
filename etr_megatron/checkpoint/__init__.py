"""Saving and resuming a run."""

from etr_megatron.checkpoint.checkpoint import latest_step, load, save

__all__ = ["latest_step", "load", "save"]
