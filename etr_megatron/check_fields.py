"""Check `train.megatron` against the model and, with Megatron itself, against the layout. Every check raises UserError."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from etr_megatron.config import Config
from etr_megatron.config.megatron_fields import FIELDS, KEY
from etr_megatron.errors import UserError

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, Experts

_EXPERTS = ("moe", "moe_act", "shared_experts")
"""Parts of experts in `recompute_modules`."""


def check_fields_without_experts(model: str, config: Config) -> None:
    """Refuse fields that have no effect on a model without experts."""
    _refuse(f"{model} has no experts", config, [name for name in FIELDS if FIELDS[name].experts], _EXPERTS)


def check_fields_without_shared_expert(model: str, config: Config) -> None:
    """Refuse fields that have no effect on a model without a shared expert."""
    _refuse(f"{model} has no shared expert", config, ["moe_shared_expert_overlap"], ["shared_experts"])


def check_fields_without_dense_layers(model: str, config: Config) -> None:
    """Refuse fields that have no effect on a model of which all layers have experts."""
    _refuse(f"{model} has no layer without experts", config, [], ["mlp"])


def _refuse(reason: str, config: Config, names: Collection[str], modules: Collection[str]) -> None:
    """Raise UserError for one of the fields `names`, or one of `modules` to recompute."""
    for name, value in config.train.megatron.items():
        if name in names:
            raise UserError(f"{reason}, so {KEY}.{name} has no effect; remove it")
        if isinstance(value, tuple) and (found := [one for one in value if one in modules]):
            raise UserError(f"{reason}, so {found[0]} in {KEY}.{name} has no effect; remove it there")


def check_dispatcher(model: str, experts: Experts, config: Config) -> None:
    """Refuse the `flex` dispatcher where it cannot work, and DeepEP with routing weights that it would convert in every
    layer."""
    fields, parallel = config.train.megatron, config.parallel
    if fields.get("moe_token_dispatcher_type") != "flex":
        return
    if parallel.ep * int(parallel.tp if parallel.etp is None else parallel.etp) == 1:
        raise UserError(
            f"{KEY}.moe_token_dispatcher_type=flex sends tokens between ranks, but every rank has all experts of {model}; "
            "set parallel.ep above 1, or remove the field"
        )
    if experts.score_function != "sigmoid" and not config.train.moe_router_fp32:
        raise UserError(
            f"{KEY}.moe_token_dispatcher_type=flex needs routing weights in float32; set train.moe_router_fp32 to true"
        )


def check_fields(architecture: Architecture, config: Config) -> None:
    """Check the fields with Megatron's own config, and what it needs from this machine. Takes seconds if there are fields.

    config: resolved, and its layout fits the model.
    """
    if not config.train.megatron:
        return
    _check_machine(architecture, config)
    from etr_megatron.policy.model_config import configured_transformer
    from etr_megatron.policy.parallel import Layout

    parallel = config.parallel
    assert parallel.tp != "auto"
    layout = Layout(
        rank=0,
        world=parallel.tp * parallel.pp * parallel.cp,
        tp=parallel.tp,
        tp_rank=0,
        pp=parallel.pp,
        stage=0,
        dp=1,
        dp_rank=0,
        ep=parallel.ep,
        ep_rank=0,
        etp=parallel.tp if parallel.etp is None else parallel.etp,
        etp_rank=0,
        cp=parallel.cp,
        vpp=parallel.vpp,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )
    configured_transformer(architecture, layout, config)


def _check_machine(architecture: Architecture, config: Config) -> None:
    """Check packages and variables that Megatron looks for only while it builds the model."""
    fields = config.train.megatron
    if config.run.platform == "cpu":
        return
    if fields.get("moe_token_dispatcher_type") == "flex" and importlib.util.find_spec("deep_ep") is None:
        raise UserError(
            f"{KEY}.moe_token_dispatcher_type=flex needs the package deep_ep, which is not installed; see "
            "https://github.com/deepseek-ai/DeepEP, or remove the field"
        )
    if fields.get("deterministic_mode") is True and os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") != "0":
        raise UserError(
            f"{KEY}.deterministic_mode=true needs the environment variable NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 on every node "
            "with ranks"
        )
    if architecture.experts is None and architecture.latent is None and importlib.util.find_spec("transformer_engine"):
        _refuse("Transformer Engine computes this model's norms together with linear layers", config, [], ["layernorm"])
