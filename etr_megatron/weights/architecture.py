"""A model's architecture from a HuggingFace config.json, whether published or written by transformers 5."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etr_megatron.config import TinyConfig
from etr_megatron.errors import UserError
from etr_megatron.weights.experts import Experts, read_biased_experts, read_qwen3_experts
from etr_megatron.weights.hf_config import (
    natural_number,
    optional_bool,
    positive_int,
    positive_number,
    read_config,
    spelled,
)
from etr_megatron.weights.latent import LatentAttention, read_latent_attention
from etr_megatron.weights.map import TABLES
from etr_megatron.weights.rope import read_rope
from etr_megatron.weights.run_checkpoint import refuse_adapters

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
"""HuggingFace architecture -> family of the weight map, named as `model_type` in config.json."""

BIASED_ROUTERS = ("glm4_moe", "glm4_moe_lite", "deepseek_v3")
"""Families whose routers choose experts by sigmoid plus a bias per expert. Their published checkpoints have layers for
multi-token prediction."""


@dataclass(frozen=True)
class Architecture:
    """A decoder with grouped-query or (`latent`) latent attention, RMSNorm and gated MLPs, dense or (`experts`) mixtures.

    rope: parameters of the rotary embedding as transformers 5 writes them (`rope_type`, `rope_theta`, scaling factors,
    `partial_rotary_factor`), see `read_rope`. use_qk_norm: whether queries and keys have norms, in families whose table has
    rows for such norms. mtp_layers: layers that a checkpoint may have after the last one, for multi-token prediction. They are
    neither loaded nor trained. With latent attention, head_dim is the size of a query and a key, and every head has its own
    keys and values.
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
    norm_eps: float
    max_positions: int
    rope: dict[str, Any] = field(default_factory=dict, hash=False)
    experts: Experts | None = None
    use_qk_norm: bool = True
    latent: LatentAttention | None = None
    mtp_layers: int = field(default=0, compare=False)

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return _has_rows(self.family, "linear_qkv.bias")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys have an RMSNorm per head."""
        return self.use_qk_norm and self.latent is None and _has_rows(self.family, "q_layernorm.")

    @property
    def value_dim(self) -> int:
        """Dimensions of a head's value."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def rotary_fraction(self) -> float:
        """The fraction of a head's dimensions that the rotary embedding rotates; these come first."""
        return self.rope.get("partial_rotary_factor", 1.0)

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has a dense MLP."""
        return self.experts is None or bool(self.experts.dense_layers)

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of `layer` is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def expert_layers(self) -> list[int]:
        """The layers that `has_experts` holds for."""
        return [layer for layer in range(self.layers) if self.has_experts(layer)]

    def kv_heads_of_a_rank(self, tp: int) -> int:
        """Key/value heads on each of `tp` tensor-parallel ranks; with fewer heads than ranks, neighbours share one."""
        return max(1, self.kv_heads // tp)


def _has_rows(family: str, part: str) -> bool:
    """Whether the family's table has a row with this in its Megatron name."""
    return any(part in row.megatron for row in TABLES[family])


def _refuse_unsupported(config: dict[str, Any], family: str, source: Path) -> None:
    """Raise UserError for settings that change the model in transformers or a server but not here, and that no tensor shows."""
    wanted: dict[str, Any] = {"model_type": family, "hidden_act": "silu", "mlp_bias": False}
    wanted |= {"use_sliding_window": False, "is_causal": True}
    if not _has_rows(family, "linear_qkv.bias"):
        wanted["attention_bias"] = False
    if family == "glm4_moe":
        config = {"attention_bias": False, **config}  # transformers' default
        wanted["attention_bias"] = True
    if family in BIASED_ROUTERS:
        wanted |= {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    if family in ("glm4_moe", "glm4_moe_lite"):
        wanted |= {"n_group": 1, "topk_group": 1}
    if family == "deepseek_v3":
        wanted["index_topk"] = None  # with it, SGLang would use V3.2's sparse attention
    for key, value in wanted.items():
        if config.get(key, value) != value:
            found, only = spelled(config[key]), spelled(value)
            raise UserError(f"{source}: {key} is {found}; only {only} is supported for the {family} family")
    window = config.get("sliding_window", 4096)  # transformers' default
    if family == "mistral" and window is not None:
        raise UserError(f"{source}: sliding_window is {spelled(window)}; only null is supported for the mistral family")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{source}: layer_types is {spelled(kinds)}; only a list of full_attention is supported")


def read_architecture(model_dir: str | Path, *, named: str = "model.path") -> Architecture:
    """The architecture that `model_dir/config.json` describes.

    named: the setting that gave the directory, for messages. How the weights are stored (`quantization_config`) is not part of
    the result. Raises UserError, naming the file and the field, for a missing or broken file, a missing or malformed field, and
    anything that is not supported; and for a directory of adapters alone.
    """
    refuse_adapters(model_dir, named)
    source = Path(model_dir) / "config.json"
    try:
        config = read_config(source)
    except FileNotFoundError:
        run = Path(model_dir, "checkpoints").is_dir()
        way_out = f"; `tools/convert_hf.py to-hf --megatron {model_dir}` creates one from this run" if run else ""
        raise UserError(f"{source} does not exist: {named} must be a HuggingFace checkpoint directory{way_out}") from None
    names = config.get("architectures") or []
    known = [name for name in names if isinstance(name, str) and name in FAMILIES] if isinstance(names, list) else []
    if not known:
        raise UserError(f"{source}: architectures is {names}; supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[known[0]]
    biased = family in BIASED_ROUTERS
    _refuse_unsupported(config, family, source)
    heads, hidden = (positive_int(config, name, source) for name in ("num_attention_heads", "hidden_size"))
    kv_heads = positive_int(config, "num_key_value_heads", source, heads)
    if heads % kv_heads:
        raise UserError(f"{source}: num_attention_heads is {heads}, which is not a multiple of num_key_value_heads {kv_heads}")
    layers, mixture = positive_int(config, "num_hidden_layers", source), _has_rows(family, ".experts.")
    latent = read_latent_attention(config, source) if _has_rows(family, ".linear_kv_up_proj.") else None
    if latent and kv_heads != heads:
        raise UserError(f"{source}: num_key_value_heads is {kv_heads}; only {heads}, the number of heads, is supported")
    experts = None
    if mixture:
        experts = read_biased_experts(config, layers, source, family) if biased else read_qwen3_experts(config, layers, source)
    return Architecture(
        family=family,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=positive_int(config, "intermediate_size", source),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=latent.head_dim if latent else positive_int(config, "head_dim", source, hidden // heads),
        vocab_size=positive_int(config, "vocab_size", source),
        tied_embeddings=optional_bool(config, "tie_word_embeddings", source),
        norm_eps=positive_number(config, "rms_norm_eps", source),
        max_positions=positive_int(config, "max_position_embeddings", source, 0),
        rope=read_rope(config, source, fraction=0.5 if family == "glm4_moe" else None, latent=latent is not None),
        use_qk_norm=optional_bool(config, "use_qk_norm", source) if family == "glm4_moe" else True,
        experts=experts,
        latent=latent,
        mtp_layers=natural_number(config, "num_nextn_predict_layers", source, 0) if biased else 0,
    )


def tiny_architecture(tiny: TinyConfig) -> Architecture:
    """The architecture of the model that `data.tiny` builds, with the largest possible vocabulary."""
    return Architecture(
        family="qwen3",
        layers=tiny.layers,
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        heads=tiny.heads,
        kv_heads=tiny.heads // 2,
        head_dim=tiny.head_dim,
        vocab_size=tiny.vocab_size,
        tied_embeddings=False,
        norm_eps=1e-6,
        max_positions=0,
        rope={"rope_type": "default", "rope_theta": 10000.0},
    )
