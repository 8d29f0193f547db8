"""What a HuggingFace config.json says about a model, in one form for the published and the transformers 5 way of writing it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etr_megatron.errors import UserError
from etr_megatron.weights.map import TABLES

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""HuggingFace architecture -> family of the weight map."""


@dataclass(frozen=True)
class Experts:
    """Mixture of gated MLPs in place of the dense one, in all layers but `dense_layers`.

    normalized: whether the weights of a token's chosen experts are divided by their sum.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool
    dense_layers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Architecture:
    """A decoder with grouped-query attention, RMSNorm and gated MLPs, dense or (`experts`) mixtures.

    rope: parameters of the rotary embedding as transformers 5 writes them (`rope_type`, `rope_theta`, scaling factors).
    qkv_bias, qk_norm: biases on q/k/v, RMSNorm on queries and keys per head; what the family's table has rows for.
    """

    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    max_positions: int
    rope: dict[str, Any] = field(default_factory=dict)
    experts: Experts | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of `layer` is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers


def _rope(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Both spellings: `rope_theta` + `rope_scaling` as published, `rope_parameters` as transformers 5 writes it."""
    rope = dict(config.get("rope_parameters") or {})
    scaling = config.get("rope_scaling") or {}
    rope = {**scaling, **rope}
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(f"{source}: rope_type {rope['rope_type']!r} is not supported; known are default and llama3")
    return rope


def _has_rows(family: str, part: str) -> bool:
    """Whether the family's table has a row with this in its Megatron name."""
    return any(part in row.megatron for row in TABLES[family])


def _refuse_unsupported(config: dict[str, Any], family: str, source: Path) -> None:
    wanted = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
    if not _has_rows(family, "linear_qkv.bias"):
        wanted["attention_bias"] = False
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"{source}: {key} is {config[key]!r}; the {family} family is supported with {value!r} only")


def _experts(config: dict[str, Any]) -> Experts:
    """Published configs say num_experts, transformers 5 writes num_local_experts."""
    layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = {layer for layer in range(layers) if (layer + 1) % step} | set(config.get("mlp_only_layers") or ())
    return Experts(
        count=config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        per_token=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        normalized=bool(config.get("norm_topk_prob", False)),
        dense_layers=frozenset(dense & set(range(layers))),
    )


def read_architecture(model_dir: str | Path, *, named: str = "model.path") -> Architecture:
    """The architecture that `model_dir/config.json` describes.

    named: what the directory was given as, for messages. How the weights are stored (`quantization_config`) is no part of it.
    Raises UserError, naming the file and the field, for a missing or broken file, a missing field and what is not supported.
    """
    source = Path(model_dir) / "config.json"
    try:
        config = json.loads(source.read_text())
    except FileNotFoundError:
        raise UserError(f"{source} does not exist: {named} must be a HuggingFace checkpoint directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{source} cannot be read as JSON: {error}") from None
    names = config.get("architectures") or []
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise UserError(f"{source}: architectures is {names}; supported are {', '.join(sorted(FAMILIES))}")
    _refuse_unsupported(config, family, source)
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Architecture(
            family=family,
            layers=config["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=_has_rows(family, "linear_qkv.bias"),
            qk_norm=_has_rows(family, "q_layernorm."),
            norm_eps=config["rms_norm_eps"],
            max_positions=config.get("max_position_embeddings", 0),
            rope=_rope(config, source),
            experts=_experts(config) if _has_rows(family, ".experts.") else None,
        )
    except KeyError as error:
        raise UserError(f"{source}: field {error} is missing") from None
