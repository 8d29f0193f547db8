"""One table per model family: how HuggingFace tensors and Megatron parameters correspond.

Everything that needs to know a weight's name follows from it: loading, export, what is checked before a run.

A row says: Megatron name, HF name(s), how it is split over tensor-parallel ranks, whether FP8 applies. The split kinds, with
the layout of a rank's shard:

    replicated  the whole tensor
    column      rows  [r n/TP, (r+1) n/TP)                     of one HF tensor
    row         columns [r n/TP, (r+1) n/TP)                   of one HF tensor
    vocab       rows, after padding the vocabulary with zero rows to a multiple of TP
    qkv         query groups: for each of the rank's groups its query heads, its key head, its value head (weight or bias)
    gate_up     the rank's rows of gate, then its rows of up
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from etr_megatron.weights.architecture import Architecture

VOCAB_MULTIPLE = 128
"""The padded vocabulary is a multiple of this times TP, Megatron's own rule."""


@dataclass(frozen=True)
class Row:
    """A line of the table; `{layer}` in the names stands for the layer's number."""

    megatron: str
    hf: tuple[str, ...]
    split: str
    fp8: bool = False


@dataclass(frozen=True)
class Weight:
    """A row for one layer of one model.

    shapes: full shapes of the HF tensors, in the order of `hf`. layer: the layer's number, or None outside of the layers.
    """

    megatron: str
    hf: tuple[str, ...]
    split: str
    fp8: bool
    shapes: tuple[tuple[int, ...], ...]
    layer: int | None


_HF, _MG = "model.layers.{layer}.", "decoder.layers.{layer}."


def _linear(name: str, hf: tuple[str, ...], split: str) -> Row:
    return Row(_MG + name, tuple(_HF + part for part in hf), split, fp8=True)


_QKV = tuple(f"self_attn.{p}_proj" for p in "qkv")
_DENSE = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Row(_MG + "input_layernorm.weight", (_HF + "input_layernorm.weight",), "replicated"),
    _linear("self_attention.linear_qkv.weight", tuple(p + ".weight" for p in _QKV), "qkv"),
    _linear("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "row"),
    Row(_MG + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), "replicated"),
    _linear("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
    _linear("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "row"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Row("output_layer.weight", ("lm_head.weight",), "vocab"),
)
_QKV_BIAS = (Row(_MG + "self_attention.linear_qkv.bias", tuple(_HF + p + ".bias" for p in _QKV), "qkv"),)
_QK_NORM = tuple(
    Row(_MG + f"self_attention.{p}_layernorm.weight", (_HF + f"self_attn.{p}_norm.weight",), "replicated") for p in "qk"
)
TABLES: dict[str, tuple[Row, ...]] = {
    "llama": _DENSE,
    "qwen2": _DENSE + _QKV_BIAS,
    "qwen3": _DENSE + _QK_NORM,
}
"""Family -> rows, with the names of Megatron's local layer spec; `to_te_name` gives Transformer Engine's."""

_TE_NAMES = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


def to_te_name(megatron: str) -> str:
    """Name of the same parameter in the Transformer Engine spec, where layer norms are fused into the linear after them."""
    for local, fused in _TE_NAMES.items():
        if megatron.endswith(local):
            return megatron.removesuffix(local) + fused
    return megatron


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Vp: the smallest multiple of `VOCAB_MULTIPLE * tp` that holds the vocabulary."""
    step = VOCAB_MULTIPLE * tp
    return -(-vocab_size // step) * step


def _shape(hf: str, arch: Architecture) -> tuple[int, ...]:
    """Full shape of an HF tensor, by the last parts of its name."""
    hidden, head = arch.hidden_size, arch.head_dim
    module, kind = hf.rsplit(".", 2)[-2:]
    rows_columns = {
        "embed_tokens": (arch.vocab_size, hidden),
        "lm_head": (arch.vocab_size, hidden),
        "q_proj": (arch.heads * head, hidden),
        "k_proj": (arch.kv_heads * head, hidden),
        "v_proj": (arch.kv_heads * head, hidden),
        "o_proj": (hidden, arch.heads * head),
        "gate_proj": (arch.intermediate_size, hidden),
        "up_proj": (arch.intermediate_size, hidden),
        "down_proj": (hidden, arch.intermediate_size),
        "q_norm": (head,),
        "k_norm": (head,),
    }
    shape = rows_columns.get(module, (hidden,))
    return shape[:1] if kind == "bias" else shape


def weights_of(arch: Architecture) -> Iterator[Weight]:
    """Every weight of the model once: embedding, layer by layer, final norm, head (absent when tied)."""

    def make(row: Row, layer: int | None) -> Weight:
        hf = tuple(name.format(layer=layer) for name in row.hf)
        shapes = tuple(_shape(name, arch) for name in hf)
        return Weight(row.megatron.format(layer=layer), hf, row.split, row.fp8, shapes, layer)

    rows = TABLES[arch.family]
    in_layer = [row for row in rows if "{layer}" in row.megatron]
    outside = [row for row in rows if "{layer}" not in row.megatron]
    yield make(outside[0], None)
    for layer in range(arch.layers):
        for row in in_layer:
            yield make(row, layer)
    for row in outside[1:]:
        if not (row.megatron == "output_layer.weight" and arch.tied_embeddings):
            yield make(row, None)
