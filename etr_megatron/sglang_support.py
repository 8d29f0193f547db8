"""Checks whether SGLang can serve a model, before any server is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from etr_megatron.config.schema.fp8 import FP8_BLOCK
from etr_megatron.errors import UserError

if TYPE_CHECKING:
    from etr_megatron.config import SglangConfig
    from etr_megatron.weights import Architecture


_NAMES = {"qwen3_moe": "Qwen3-MoE", "glm4_moe": "GLM-4.5", "glm4_moe_lite": "GLM-4.7-Flash", "deepseek_v3": "DeepSeek-V3"}


_NOT_IN_PARALLEL = ("llama", "mistral", "qwen2")
"""Families whose attention SGLang (0.5.21) splits over all TP ranks and never data-parallel (`models/llama.py`, `qwen2.py`):
with `--enable-dp-attention` ranks with different tokens would add up their outputs."""


def check_sglang_support(model: str, architecture: Architecture, sglang: SglangConfig) -> None:
    """Check that a server can shard the model (with `sglang.fp8` into whole blocks) and supports all its features.

    Raises UserError if not, and ValueError for a matrix that cannot be sharded at all.
    """
    _check_attention(model, architecture, sglang)
    _check_sizes(model, architecture, sglang.tp, sglang.ep)
    if sglang.fp8:
        _check_fp8_blocks(architecture, sglang)


def _check_attention(model: str, architecture: Architecture, sglang: SglangConfig) -> None:
    heads, tp, dp = architecture.heads, sglang.tp, sglang.dp_attention
    if dp > 1 and architecture.family in _NOT_IN_PARALLEL:
        raise UserError(
            f"{model} is a {architecture.family} model, of which SGLang would compute wrong outputs with data-parallel "
            "attention; set sglang.dp_attention to 1"
        )
    if heads % (tp // dp):
        ways = f"the {tp // dp} GPUs of each of sglang.dp_attention={dp} groups do" if dp > 1 else f"sglang.tp={tp} does"
        raise UserError(
            f"{model} has {heads} attention heads, which {ways} not divide, and a server would refuse to start; "
            f"choose a sglang.tp that divides {heads}{' x dp_attention' * (dp > 1)}"
        )


def _check_sizes(model: str, architecture: Architecture, tp: int, ep: int) -> None:
    experts = architecture.experts
    if experts is None:
        if ep > 1:
            raise UserError(f"{model} has no experts to spread over sglang.ep={ep}; set sglang.ep to 1")
        return
    if experts.count % ep:
        raise UserError(
            f"{model} has {experts.count} experts, which sglang.ep={ep} does not divide, and a server would refuse to start; "
            f"choose a sglang.ep that divides {experts.count}"
        )
    if experts.intermediate_size % (tp // ep):
        raise UserError(
            f"{model} has experts of width {experts.intermediate_size}, which the {tp // ep} ranks of each (sglang.tp={tp} / "
            f"sglang.ep={ep}) do not divide, and a server would refuse to start; choose a sglang.tp and a sglang.ep that do"
        )
    if experts.shared_size % tp:
        raise UserError(
            f"{model} has a shared expert of width {experts.shared_size}, which sglang.tp={tp} does not divide, and a server "
            "would refuse to start; choose a sglang.tp that does"
        )
    # SGLang would start with any of these, but some weights would stay randomly initialized: the checkpoint lacks them, or
    # SGLang ignores them there.
    family, unserved = architecture.family, ""
    if family == "qwen3_moe" and experts.dense_layers:
        unserved = "dense layers (mlp_only_layers, decoder_sparse_step)"
    elif family == "glm4_moe_lite" and architecture.latent is not None and architecture.latent.q_rank is None:
        unserved = "queries without a latent (q_lora_rank of null)"
    elif family != "deepseek_v3" and architecture.tied_embeddings:
        unserved = "tied embeddings (tie_word_embeddings)"
    if unserved:
        raise UserError(
            f"{model} has experts and {unserved}, which SGLang's {_NAMES[family]} does not support; "
            "set rollout.backend to embedded"
        )


def _check_fp8_blocks(architecture: Architecture, sglang: SglangConfig) -> None:
    from etr_megatron.weights import ServerLayout, weights_of

    layout = ServerLayout(tp=sglang.tp, ep=sglang.ep, attention_dp=sglang.dp_attention)
    some = (0, architecture.layers - 1)  # layers and experts are alike
    weights = [one for one in weights_of(architecture, first_expert=True) if one.fp8 and one.layer in some]
    last_of = {weight.server: weight for weight in weights}
    for weight in weights:
        # A parameter that is not split on a server may end with a partial block of rows, as in the published DeepSeek-V3.
        may_end = weight.split == "replicated" and weight is last_of[weight.server]
        for placed in layout.placed_shards(weight, architecture):
            for piece in placed.shard.pieces:
                if not _is_whole_blocks(piece.size[may_end:]):
                    shape = " x ".join(map(str, piece.size))
                    way_out = "lower sglang.tp, or raise sglang.ep for experts"
                    way_out += " or sglang.dp_attention for attention" if sglang.dp_attention > 1 else ""
                    if not _is_whole_blocks(weight.shapes[piece.hf]):
                        way_out = "no sglang.tp gives such; set sglang.fp8 to false"
                    raise UserError(
                        f"sglang.fp8: {weight.hf[piece.hf]} is split into parts of {shape} by sglang.tp={sglang.tp}, "
                        f"sglang.ep={sglang.ep}, which are not whole blocks of {FP8_BLOCK} x {FP8_BLOCK}; {way_out}"
                    )


def _is_whole_blocks(sizes: Sequence[int]) -> bool:
    return not any(size % FP8_BLOCK for size in sizes)
