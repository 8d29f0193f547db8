"""A model's experts from its HuggingFace config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etr_megatron.errors import UserError
from etr_megatron.weights.hf_config import (
    natural_number,
    optional_bool,
    optional_layers,
    positive_int,
    positive_number,
    spelled,
)


@dataclass(frozen=True)
class Experts:
    """Mixture of gated MLPs in place of the dense one, in all layers but `dense_layers`.

    normalized: whether the weights of a token's chosen experts are divided by their sum. shared_size: width of the shared MLP,
    which every token passes besides its experts; 0 is none. score_function: how the router turns logits into scores.
    expert_bias: whether experts are chosen by score plus a bias per expert. scaling_factor: factor on the chosen experts'
    weights. groups: number of groups of consecutive experts. A token chooses experts from only `groups_per_token` groups, those
    with the largest sums of their two best scores.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool
    dense_layers: frozenset[int] = frozenset()
    shared_size: int = 0
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    expert_bias: bool = False
    scaling_factor: float = 1.0
    groups: int = 1
    groups_per_token: int = 1


def read_qwen3_experts(config: dict[str, Any], layers: int, source: Path) -> Experts:
    """Published configs say num_experts, transformers 5 writes num_local_experts. Raises UserError."""
    step = positive_int(config, "decoder_sparse_step", source, 1)
    dense = {layer for layer in range(layers) if (layer + 1) % step} | set(optional_layers(config, "mlp_only_layers", source))
    count = positive_int(config, "num_experts" if "num_experts" in config else "num_local_experts", source)
    per_token = _per_token(config, count, source)
    normalized = optional_bool(config, "norm_topk_prob", source)
    if per_token == 1 and normalized:
        raise UserError(f"{source}: num_experts_per_tok is 1 with norm_topk_prob, which leaves the router without a gradient")
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=positive_int(config, "moe_intermediate_size", source),
        normalized=normalized,
        dense_layers=frozenset(dense & set(range(layers))),
    )


_DEFAULTS = {
    "glm4_moe": dict(n_group=1, topk_group=1, first_k_dense_replace=1, routed_scaling_factor=1.0),
    "glm4_moe_lite": dict(n_group=1, topk_group=1, first_k_dense_replace=1, routed_scaling_factor=1.8),
    "deepseek_v3": dict(n_group=8, topk_group=4, first_k_dense_replace=3, routed_scaling_factor=2.5),
}
"""transformers' values of absent fields."""


def read_biased_experts(config: dict[str, Any], layers: int, source: Path, family: str) -> Experts:
    """Experts that are chosen by sigmoids plus biases, those of GLM-4.5 and DeepSeek-V3. Raises UserError."""
    defaults = _DEFAULTS[family]
    count = positive_int(config, "n_routed_experts", source)
    per_token = _per_token(config, count, source)
    if per_token == 1:
        raise UserError(f"{source}: num_experts_per_tok is 1, which leaves the router without a gradient")
    size = positive_int(config, "moe_intermediate_size", source)
    dense = natural_number(config, "first_k_dense_replace", source, int(defaults["first_k_dense_replace"]))
    if family == "glm4_moe_lite":
        dense = _listed_dense(config, layers, source)
    if dense >= layers:
        raise UserError(f"{source}: first_k_dense_replace is {dense}, which leaves none of the {layers} layers with experts")
    groups, chosen = (positive_int(config, name, source, int(defaults[name])) for name in ("n_group", "topk_group"))
    _refuse_other_groups(count, per_token, groups, chosen, source)
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=size,
        normalized=True,
        dense_layers=frozenset(range(dense)),
        shared_size=size * positive_int(config, "n_shared_experts", source, 1),
        score_function="sigmoid",
        expert_bias=True,
        scaling_factor=positive_number(config, "routed_scaling_factor", source, defaults["routed_scaling_factor"]),
        groups=groups,
        groups_per_token=chosen if groups > 1 else 1,
    )


def _listed_dense(config: dict[str, Any], layers: int, source: Path) -> int:
    """Number of first layers without experts in GLM-4.7-Flash. Published configs and servers say first_k_dense_replace;
    transformers reads and writes the kind of every layer, and without such a list only the first is dense."""
    kinds = config.get("mlp_layer_types")
    listed = ["dense"] + ["sparse"] * (layers - 1) if kinds is None else kinds
    dense = listed.count("dense") if isinstance(listed, list) else 0
    if listed != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise UserError(
            f"{source}: mlp_layer_types is {spelled(kinds)}; only dense layers followed by sparse ones, {layers} in all, are "
            "supported"
        )
    said = config.get("first_k_dense_replace")
    if said is not None and said != dense:
        why = "for transformers without mlp_layer_types" if kinds is None else "in mlp_layer_types"
        raise UserError(f"{source}: first_k_dense_replace is {said}, but {dense} {why}; correct the wrong one")
    return dense


def _refuse_other_groups(count: int, per_token: int, groups: int, chosen: int, source: Path) -> None:
    if count % groups or chosen > groups or count // groups * chosen < per_token:
        raise UserError(
            f"{source}: n_group={groups} with topk_group={chosen} cannot give {per_token} of {count} experts to a token"
        )
    if groups > 1 and (per_token // chosen != 2 or count // groups < 2):
        # Megatron ranks groups by their `per_token / groups_per_token` best experts, other implementations by their two best.
        raise UserError(
            f"{source}: num_experts_per_tok={per_token} with topk_group={chosen} of {groups} groups of {count // groups} "
            "experts; groups are supported only if a token has two experts in each that it may choose from"
        )


def _per_token(config: dict[str, Any], count: int, source: Path) -> int:
    per_token = positive_int(config, "num_experts_per_tok", source)
    if per_token > count:
        raise UserError(f"{source}: num_experts_per_tok is {per_token}, more than the {count} experts")
    return per_token
