"""Sampling of responses: the engine protocol, the grading of groups, and the samplers that return a step's groups.

The embedded engine is not exported here: import it from `embedded`. It needs transformers, which readers of records do not.
"""

from etr_megatron.rollout.collect import UngradedError, generate_groups, grade_groups
from etr_megatron.rollout.engine import (
    EngineGoneError,
    NeedsSyncError,
    OtherModelError,
    RefusedError,
    RolloutEngine,
    Sampling,
    StreamingEngine,
    sample_seed,
)
from etr_megatron.rollout.sampler import ReplaySampler, Rollouts, RoundSampler, Sampler
from etr_megatron.rollout.streaming import StreamingSampler

__all__ = [
    "EngineGoneError",
    "NeedsSyncError",
    "OtherModelError",
    "RefusedError",
    "ReplaySampler",
    "RolloutEngine",
    "Rollouts",
    "RoundSampler",
    "Sampler",
    "Sampling",
    "StreamingEngine",
    "StreamingSampler",
    "UngradedError",
    "generate_groups",
    "grade_groups",
    "sample_seed",
]
