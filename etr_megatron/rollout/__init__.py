"""Sampling of responses: the engine protocol, the embedded engine, groups with rewards."""

from etr_megatron.rollout.collect import generate_groups, grade_groups
from etr_megatron.rollout.embedded import EmbeddedEngine
from etr_megatron.rollout.engine import EngineGoneError, RolloutEngine, Sampling, sample_seed

__all__ = ["EmbeddedEngine", "EngineGoneError", "RolloutEngine", "Sampling", "generate_groups", "grade_groups", "sample_seed"]
