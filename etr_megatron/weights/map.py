"""One table per model family: how HuggingFace tensors, Megatron parameters and a server's fused parameters correspond.

Everything that needs a weight's name is derived from this table: loading, conversion, export, the plan of a weight sync, the
choice of quantised weights, and checks before a run. `shards` implements the ways to cut a weight (`split`):

    replicated  the whole tensor
    column      rows  [r n/TP, (r+1) n/TP)                     of one HF tensor
    row         columns [r n/TP, (r+1) n/TP)                   of one HF tensor
    vocab       rows, after padding the vocabulary with zero rows
    qkv         Megatron: for each of the rank's query groups its query heads, its key head, its value head; an even part of a
                group if there are fewer groups than ranks. Server: the rank's query heads, then its key heads, then its value
                heads (weight or bias)
    gate_up     the rank's rows of gate, then its rows of up
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # it imports this module
    from etr_megatron.weights.architecture import Architecture


@dataclass(frozen=True)
class Row:
    """A line of the table; `{layer}` and `{expert}` in the names stand for numbers.

    megatron: name in Megatron's local layer spec. te: name in Transformer Engine's spec, if it differs.
    hf: (name, dimensions) of each HF tensor; a dimension is a letter of `_dimensions`.
    server: name of SGLang's parameter, if it is not the HF name. Rows with the same name are stacked in that parameter, in
    order. fp8: whether block-quantised export and sync quantise it. fp32: whether it is float32, whatever the model's dtype.
    layers: which layers have it: all, dense (layers with a dense MLP), moe (layers with experts).
    """

    megatron: str
    split: str
    hf: tuple[tuple[str, str], ...]
    te: str = ""
    server: str = ""
    fp8: bool = False
    fp32: bool = False
    layers: str = "all"


@dataclass(frozen=True)
class Weight:
    """A row for one layer, and one expert, of one model.

    megatron, te: names in the two layer specs, layers and experts counted over the whole model.
    stored, stored_at: name in a `torch_dist` checkpoint, and (index, size) in its leading axes: of the layer, of the expert.
    hf, shapes: HF names and full shapes. server: the server's parameter. All experts of a rank share one. Other weights may
    share one too: it holds their rows, in the model's order.
    layer, expert: index of the layer and of the expert; None for weights outside of layers or experts.
    """

    megatron: str
    te: str
    stored: str
    stored_at: tuple[tuple[int, int], ...]
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: str
    fp8: bool
    fp32: bool
    server: str
    layer: int | None = None
    expert: int | None = None

    def type_in(self, dtype: torch.dtype) -> torch.dtype:
        """Its type in a model, checkpoint or sync of this dtype."""
        return torch.float32 if self.fp32 else dtype


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
"""Megatron's names of the two weights that may be tied. Every table has a row for each, with one HF tensor."""

_HF, _MG = "model.layers.{layer}.", "decoder.layers.{layer}."


def _row(
    megatron: str,
    split: str,
    hf: dict[str, str],
    *,
    te: str = "",
    server: str = "",
    fp8: bool = False,
    fp32: bool = False,
    layers: str = "all",
) -> Row:
    """A row within a layer: names without the layer's prefix."""
    named = tuple((_HF + name, dims) for name, dims in hf.items())
    te, server = _MG + te if te else "", _HF + server if server else ""
    return Row(_MG + megatron, split, named, te, server, fp8, fp32, layers)


_EMBEDDING = Row(EMBEDDING, "vocab", (("model.embed_tokens.weight", "VH"),))
_END = (
    Row("decoder.final_layernorm.weight", "replicated", (("model.norm.weight", "H"),)),
    Row(HEAD, "vocab", (("lm_head.weight", "VH"),)),
)
_ATTENTION = (
    _row(
        "input_layernorm.weight",
        "replicated",
        {"input_layernorm.weight": "H"},
        te="self_attention.linear_qkv.layer_norm_weight",
    ),
    _row(
        "self_attention.linear_qkv.weight",
        "qkv",
        {"self_attn.q_proj.weight": "QH", "self_attn.k_proj.weight": "KH", "self_attn.v_proj.weight": "KH"},
        server="self_attn.qkv_proj.weight",
        fp8=True,
    ),
    _row("self_attention.linear_proj.weight", "row", {"self_attn.o_proj.weight": "HQ"}, fp8=True),
)
_FUSED_DOWN = "self_attn.fused_qkv_a_proj_with_mqa.weight"
"""The server's parameter that stacks both down-projections: rows of the queries' projection, then of keys and values."""


def _kv_down(server: str = "") -> Row:
    hf = {"self_attn.kv_a_proj_with_mqa.weight": "LH"}
    return _row("self_attention.linear_kv_down_proj.weight", "replicated", hf, server=server, fp8=True)


_QUERIES = (
    _row("self_attention.linear_q_proj.weight", "column", {"self_attn.q_proj.weight": "QH"}, fp8=True),
    _kv_down(),
)
_LATENT_QUERIES = (
    _row(
        "self_attention.linear_q_down_proj.weight",
        "replicated",
        {"self_attn.q_a_proj.weight": "AH"},
        server=_FUSED_DOWN,
        fp8=True,
    ),
    _row(
        "self_attention.q_layernorm.weight",
        "replicated",
        {"self_attn.q_a_layernorm.weight": "A"},
        te="self_attention.linear_q_up_proj.layer_norm_weight",
    ),
    _row("self_attention.linear_q_up_proj.weight", "column", {"self_attn.q_b_proj.weight": "QA"}, fp8=True),
    _kv_down(_FUSED_DOWN),
)
_LATENT_ATTENTION = (
    _row("input_layernorm.weight", "replicated", {"input_layernorm.weight": "H"}),
    *_QUERIES,
    *_LATENT_QUERIES,
    _row(
        "self_attention.kv_layernorm.weight",
        "replicated",
        {"self_attn.kv_a_layernorm.weight": "C"},
        te="self_attention.linear_kv_up_proj.layer_norm_weight",
    ),
    _row("self_attention.linear_kv_up_proj.weight", "column", {"self_attn.kv_b_proj.weight": "UC"}, fp8=True),
    _row("self_attention.linear_proj.weight", "row", {"self_attn.o_proj.weight": "HO"}, fp8=True),
)
_QKV_BIAS = (
    _row(
        "self_attention.linear_qkv.bias",
        "qkv",
        {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
        server="self_attn.qkv_proj.bias",
    ),
)
_QK_NORM = (
    _row("self_attention.q_layernorm.weight", "replicated", {"self_attn.q_norm.weight": "D"}),
    _row("self_attention.k_layernorm.weight", "replicated", {"self_attn.k_norm.weight": "D"}),
)
_MLP = (
    _row(
        "pre_mlp_layernorm.weight",
        "replicated",
        {"post_attention_layernorm.weight": "H"},
        te="mlp.linear_fc1.layer_norm_weight",
        layers="dense",
    ),
    _row(
        "mlp.linear_fc1.weight",
        "gate_up",
        {"mlp.gate_proj.weight": "FH", "mlp.up_proj.weight": "FH"},
        server="mlp.gate_up_proj.weight",
        fp8=True,
        layers="dense",
    ),
    _row("mlp.linear_fc2.weight", "row", {"mlp.down_proj.weight": "HF"}, fp8=True, layers="dense"),
)
_EXPERTS = (
    _row("pre_mlp_layernorm.weight", "replicated", {"post_attention_layernorm.weight": "H"}, layers="moe"),
    _row("mlp.router.weight", "replicated", {"mlp.gate.weight": "XH"}, layers="moe"),
    _row(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        "gate_up",
        {"mlp.experts.{expert}.gate_proj.weight": "EH", "mlp.experts.{expert}.up_proj.weight": "EH"},
        te="mlp.experts.linear_fc1.weight{expert}",
        server="mlp.experts.w13_weight",
        fp8=True,
        layers="moe",
    ),
    _row(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        "row",
        {"mlp.experts.{expert}.down_proj.weight": "HE"},
        te="mlp.experts.linear_fc2.weight{expert}",
        server="mlp.experts.w2_weight",
        fp8=True,
        layers="moe",
    ),
)
_BIASED_ROUTER = (
    # The router adds this bias to the scores to choose experts. Pretraining uses it to balance experts; RL does not change it.
    _row("mlp.router.expert_bias", "replicated", {"mlp.gate.e_score_correction_bias": "X"}, fp32=True, layers="moe"),
)
_SHARED_EXPERTS = (
    _row(
        "mlp.shared_experts.linear_fc1.weight",
        "gate_up",
        {"mlp.shared_experts.gate_proj.weight": "SH", "mlp.shared_experts.up_proj.weight": "SH"},
        server="mlp.shared_experts.gate_up_proj.weight",
        fp8=True,
        layers="moe",
    ),
    _row(
        "mlp.shared_experts.linear_fc2.weight",
        "row",
        {"mlp.shared_experts.down_proj.weight": "HS"},
        fp8=True,
        layers="moe",
    ),
)
_LATENT_MIXTURE = (_EMBEDDING, *_LATENT_ATTENTION, *_MLP, *_EXPERTS, *_BIASED_ROUTER, *_SHARED_EXPERTS, *_END)
TABLES: dict[str, tuple[Row, ...]] = {
    "llama": (_EMBEDDING, *_ATTENTION, *_MLP, *_END),
    "mistral": (_EMBEDDING, *_ATTENTION, *_MLP, *_END),
    "qwen2": (_EMBEDDING, *_ATTENTION, *_QKV_BIAS, *_MLP, *_END),
    "qwen3": (_EMBEDDING, *_ATTENTION, *_QK_NORM, *_MLP, *_END),
    "qwen3_moe": (_EMBEDDING, *_ATTENTION, *_QK_NORM, *_MLP, *_EXPERTS, *_END),
    "glm4_moe": (
        *(_EMBEDDING, *_ATTENTION, *_QKV_BIAS, *_QK_NORM, *_MLP),
        *(*_EXPERTS, *_BIASED_ROUTER, *_SHARED_EXPERTS, *_END),
    ),
    "glm4_moe_lite": _LATENT_MIXTURE,
    "deepseek_v3": _LATENT_MIXTURE,
}
"""Family -> rows, in the order of the model."""


def hf_name(family: str, megatron: str) -> str:
    """HF name of a row outside of the layers, by its Megatron name; for `HEAD` also if the model ties it."""
    return next(row.hf[0][0] for row in TABLES[family] if row.megatron == megatron)


def _dimensions(arch: Architecture) -> dict[str, int]:
    """Sizes of the letters in the table's shapes."""
    experts, latent = arch.experts, arch.latent
    of_latents = {}
    if latent is not None:
        of_latents = {
            "A": latent.q_rank or 0,
            "C": latent.kv_rank,
            "L": latent.cached_dim,
            "U": arch.heads * latent.up_dim,
        }
    return {
        **of_latents,
        "V": arch.vocab_size,
        "H": arch.hidden_size,
        "Q": arch.heads * arch.head_dim,
        "K": arch.kv_heads * arch.head_dim,
        "O": arch.heads * arch.value_dim,
        "D": arch.head_dim,
        "F": arch.intermediate_size,
        "E": experts.intermediate_size if experts else 0,
        "S": experts.shared_size if experts else 0,
        "X": experts.count if experts else 0,
    }


def _stored(row: Row, arch: Architecture, layer: int | None, expert: int | None) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Name and leading axes in a `torch_dist` checkpoint, where one tensor holds all equal layers and all experts.

    Layers that differ keep their number in the name (Megatron's `non_homogeneous_layers`). Names are those of the Transformer
    Engine spec; experts have one more `experts.` than in either spec.
    """
    name, axes = row.te or row.megatron, []
    if layer is not None:
        if arch.experts is not None and arch.experts.dense_layers:
            name = name.replace("{layer}", str(layer))
        else:
            name = name.replace("{layer}.", "")
            axes.append((layer, arch.layers))
    if expert is not None and arch.experts is not None:
        name = name.replace("mlp.experts.", "mlp.experts.experts.").removesuffix("{expert}")
        axes.append((expert, arch.experts.count))
    return name, tuple(axes)


def _weight(row: Row, arch: Architecture, sizes: dict[str, int], layer: int | None, expert: int | None = None) -> Weight:
    def named(name: str) -> str:
        return name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

    stored, stored_at = _stored(row, arch, layer, expert)
    hf = tuple(named(name) for name, _ in row.hf)
    return Weight(
        megatron=named(row.megatron),
        te=named(row.te or row.megatron),
        stored=stored,
        stored_at=stored_at,
        hf=hf,
        shapes=tuple(tuple(sizes[letter] for letter in dims) for _, dims in row.hf),
        split=row.split,
        fp8=row.fp8,
        fp32=row.fp32,
        server=named(row.server) or hf[0],
        layer=layer,
        expert=expert,
    )


def _layer_weights(
    rows: tuple[Row, ...], arch: Architecture, sizes: dict[str, int], layer: int, experts: range
) -> Iterator[Weight]:
    kind = "moe" if arch.has_experts(layer) else "dense"
    for row in rows:
        if row.layers not in ("all", kind):
            continue
        if "{expert}" not in row.megatron:
            yield _weight(row, arch, sizes, layer)
        else:
            for expert in experts:
                yield _weight(row, arch, sizes, layer, expert)


def _has(arch: Architecture, row: Row) -> bool:
    """Whether this model has the row; not every model of a family has all rows of its table."""
    if row in _QK_NORM:
        return arch.qk_norm
    if arch.latent is not None and (row in _QUERIES or row in _LATENT_QUERIES):
        return (row in _LATENT_QUERIES) == (arch.latent.q_rank is not None)
    return True


def weights_of(arch: Architecture, *, first_expert: bool = False) -> tuple[Weight, ...]:
    """Every weight of the model once: embedding, layer by layer, final norm, head (absent when tied).

    first_expert: of each layer's experts, only the first; the others' weights differ only in names and number.
    """
    return _weights_of(TABLES[arch.family], arch, first_expert)


@lru_cache(maxsize=2)  # 1 KiB a weight: 30 MiB for DeepSeek-V3
def _weights_of(rows: tuple[Row, ...], arch: Architecture, first_expert: bool) -> tuple[Weight, ...]:
    sizes = _dimensions(arch)
    experts = range(arch.experts.count if arch.experts else 0)[: 1 if first_expert else None]
    in_layer = tuple(row for row in rows if "{layer}" in row.megatron and _has(arch, row))
    before = rows[: rows.index(in_layer[0])]
    after = rows[rows.index(in_layer[-1]) + 1 :]
    return (
        *(_weight(row, arch, sizes, None) for row in before),
        *(weight for layer in range(arch.layers) for weight in _layer_weights(in_layer, arch, sizes, layer, experts)),
        *(_weight(row, arch, sizes, None) for row in after if not (row.megatron == HEAD and arch.tied_embeddings)),
    )
