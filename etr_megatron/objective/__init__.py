"""Group statistics, elastic bounds, policy losses, KL estimators and aggregation, in pure non-distributed torch."""

from etr_megatron.objective.additivity import check_row_independence
from etr_megatron.objective.aggregation import token_weights
from etr_megatron.objective.bounds import ElasticBounds
from etr_megatron.objective.controls import control_radii
from etr_megatron.objective.correction import rollout_correction
from etr_megatron.objective.diagnostics import PASS_RATE_BINS, DiagnosticSums, diagnostic_sums, pass_rate_bins, read_sums
from etr_megatron.objective.groups import GroupStatistics, group_statistics
from etr_megatron.objective.inputs import LossInputs, LossOutputs, LossSettings, Sequences
from etr_megatron.objective.kl import kl_estimate
from etr_megatron.objective.losses import clip_ratio, importance_ratio, regularized
from etr_megatron.objective.registry import PolicyLoss, loss_names, register_loss, resolve_loss, token_local
from etr_megatron.objective.shaping import kl_penalty, overlong_punishment

__all__ = [
    "PASS_RATE_BINS",
    "DiagnosticSums",
    "ElasticBounds",
    "GroupStatistics",
    "LossInputs",
    "LossOutputs",
    "LossSettings",
    "PolicyLoss",
    "Sequences",
    "check_row_independence",
    "clip_ratio",
    "control_radii",
    "diagnostic_sums",
    "group_statistics",
    "importance_ratio",
    "kl_estimate",
    "kl_penalty",
    "loss_names",
    "overlong_punishment",
    "pass_rate_bins",
    "read_sums",
    "register_loss",
    "regularized",
    "resolve_loss",
    "rollout_correction",
    "token_local",
    "token_weights",
]
