"""Group statistics, elastic bounds, policy losses, KL estimators, aggregation: pure torch, nothing distributed."""

from etr_megatron.objective.aggregation import token_weights
from etr_megatron.objective.bounds import ElasticBounds
from etr_megatron.objective.controls import control_radii
from etr_megatron.objective.groups import GroupStatistics, group_statistics
from etr_megatron.objective.kl import kl_estimate
from etr_megatron.objective.losses import LossInputs, LossOutputs, clipped_loss, get_loss, register_loss

__all__ = [
    "ElasticBounds",
    "GroupStatistics",
    "LossInputs",
    "LossOutputs",
    "clipped_loss",
    "control_radii",
    "get_loss",
    "group_statistics",
    "kl_estimate",
    "register_loss",
    "token_weights",
]
