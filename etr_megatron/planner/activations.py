"""Bytes that forward passes keep for backward passes, counted from the tensors that a layer saves.

Follows Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), with the tensors
of this decoder: grouped-query or latent attention without a stored score matrix (flash attention), RMSNorm, a gated MLP, no
dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from etr_megatron.planner.recompute import Recomputation

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, Experts, TrainingLayout

FP8_BYTES = {"blockwise": 1 + 4 / 128, "tensorwise": 1.0, "delayed": 1.0, "mxfp8": 1 + 1 / 32}
"""Bytes per element of a GEMM input that Transformer Engine keeps for the weight gradient, including scales.

TE 2.11 keeps one of the two copies that it makes, the column-wise one (with sequence parallelism and per-tensor scales the
row-wise one, the only one that can be gathered): see `update_usage` at the end of the forward passes of
pytorch/module/linear.py, layernorm_linear.py and grouped_linear.py. Scales: one fp32 per 128 values
(Float8BlockQuantizer.get_scale_shape), one byte per 32 (MXFP8), or one per tensor.
"""

EXPERT_IMBALANCE = 1.25
"""Assumed: tokens of the rank with the busiest experts, relative to an even share."""


@dataclass(frozen=True)
class Split:
    """How a microbatch's tokens and a layer's width are split over ranks.

    tokens: per context-parallel rank. element: bytes per activation element. fp8: `fp8.recipe`. router_fp32:
    `train.moe_router_fp32`.
    """

    tokens: int
    tp: int
    sequence_parallel: bool
    element: int
    fp8: str = "none"
    router_fp32: bool = False

    @property
    def whole(self) -> int:
        """Tokens of a full-width tensor, between the tensor-parallel regions."""
        return -(-self.tokens // self.tp) if self.sequence_parallel else self.tokens


def layer_input(arch: Architecture, split: Split) -> int:
    """Bytes of a layer's input, which is all that full recomputation keeps."""
    return split.whole * arch.hidden_size * split.element


def saved_by_layer(arch: Architecture, layer: int, split: Split, etp: int) -> int:
    """Bytes that a layer saves for its backward pass. etp: tensor parallelism of an expert.

    The two norms save their input and output. Attention and its projections save what `_attention` says. The gated MLP saves
    both halves and their product. A scale per normed row and a log-sum-exp per head and token are in fp32. With FP8, tensors
    that only GEMMs save are quantized copies.
    """
    attention, of_projections, rows = _attention(arch, split)
    apart = 4 * (2 * split.whole + rows) + _routing(arch, layer, split, etp)
    norm = split.whole * arch.hidden_size
    kept, inputs = _mlp(arch, layer, split, etp)
    kept, inputs = kept + attention + 2 * norm, inputs + of_projections + norm
    if split.fp8 == "none":
        return split.element * (kept + inputs) + apart
    if split.fp8 == "delayed":
        # Attention saves its output in the model's dtype. With other recipes, Megatron makes the projection after it use that
        # tensor (set_save_original_input in transformer/attention.py and multi_latent_attention.py).
        inputs += split.tokens * arch.heads // split.tp * arch.value_dim
    if arch.latent is not None:
        inputs += norm  # two projections have it as their input, and each quantizes it
    return split.element * kept + int(FP8_BYTES[split.fp8] * inputs) + apart


def _attention(arch: Architecture, split: Split) -> tuple[int, int, int]:
    """(elements saved regardless of GEMMs, GEMM inputs that nothing else saves, numbers in fp32) of attention, without the norm
    before it.

    Attention saves q, k, v and its output. The norms of q and k save their inputs. With latent attention, the norms of the
    latents save input and output, keys have the rotated part in every head, and the rotary embedding saves cosines and sines
    for queries and for keys, because Megatron does not fuse it there.
    """
    heads, latent = arch.heads // split.tp, arch.latent
    if latent is None:
        kv_heads = arch.kv_heads_of_a_rank(split.tp)
        normed = heads + kv_heads if arch.qk_norm else 0
        kept = split.tokens * arch.head_dim * (2 * heads + 2 * kv_heads + normed)
        return kept, 0, split.tokens * (heads + normed)
    latents = split.whole * ((latent.q_rank or 0) + latent.kv_rank)
    kept = split.tokens * (2 * heads * (arch.head_dim + arch.value_dim) + 4 * latent.rope_dim)
    norms = 1 if latent.q_rank is None else 2
    return kept + latents, latents, split.tokens * heads + norms * split.whole


def _mlp(arch: Architecture, layer: int, split: Split, etp: int) -> tuple[int, int]:
    """(elements saved regardless of GEMMs, GEMM inputs that nothing else saves) of a layer's MLP, including the preceding
    norm's output. With experts, the dispatched tokens are saved too. The router is not in FP8 and saves the norm's output. The
    outputs of experts are not saved, because the router's weights are already multiplied into the gate's product
    (`WeightedSwiGLUFunction`). A shared expert is a dense MLP. It shares the norm's output with the router, except in FP8 with
    `delayed`, where it saves its own copy (`SharedExpertMLP`)."""
    experts, norm = arch.experts, split.whole * arch.hidden_size
    if experts is None or not arch.has_experts(layer):
        product = split.tokens * arch.intermediate_size // split.tp
        return 2 * product, norm + product
    routed = _routed(experts, split, etp)
    product, shared = routed * experts.intermediate_size // etp, split.tokens * experts.shared_size // split.tp
    own = norm if experts.shared_size and split.fp8 == "delayed" else 0
    return norm + 2 * (product + shared), routed * arch.hidden_size + product + shared + own


def _routed(experts: Experts, split: Split, etp: int) -> int:
    """Tokens dispatched to a rank's experts: sequence parallelism splits tokens over TP, and each goes to `per_token` experts
    on any rank."""
    return int(split.whole * experts.per_token * etp * EXPERT_IMBALANCE)


def _routing(arch: Architecture, layer: int, split: Split, etp: int) -> int:
    """Bytes saved for routing, 0 for a dense layer. Per token: a flag and a weight for every expert, two 64-bit indices for
    each chosen expert, and scores in fp32. With softmax, the scores are over the chosen experts' logits or, if not normalized,
    over all. With sigmoids, they are of all experts, of the chosen experts, and their sum. Per dispatched token: a weight."""
    experts = arch.experts
    if experts is None or not arch.has_experts(layer):
        return 0
    scores = experts.per_token if experts.normalized else experts.count
    if experts.score_function == "sigmoid":
        scores = experts.count + experts.per_token + 1
    weight = _weight_bytes(experts, split)
    choice = experts.count * (1 + weight) + 2 * 8 * experts.per_token + 4 * scores
    return split.whole * choice + _routed(experts, split, etp) * weight


def _weight_bytes(experts: Experts, split: Split) -> int:
    """Bytes of one routing weight, which has the dtype of the router's GEMM."""
    return 4 if split.router_fp32 or experts.score_function == "sigmoid" else split.element


def beside_recomputed_attention(arch: Architecture, split: Split) -> int:
    """Extra bytes that a layer saves with `train.recompute: selective`. It recomputes only attention, whose scores flash
    attention does not store anyway, so it avoids only a log-sum-exp. But it keeps v as a view of the projection's output, and
    so the whole output, where attention itself would keep a copy of v. If ranks share a key/value head, this output is gathered
    from all of them. Latent attention makes the copy itself."""
    heads, kv_heads = arch.heads // split.tp, arch.kv_heads_of_a_rank(split.tp)
    if arch.latent is not None:
        return -4 * split.tokens * heads
    output = heads + 2 * kv_heads if arch.kv_heads >= split.tp else arch.heads + 2 * arch.kv_heads
    return split.tokens * (split.element * (output - kv_heads) * arch.head_dim - 4 * heads)


def gradients_of_layer(arch: Architecture, layer: int, split: Split, etp: int) -> int:
    """Bytes in addition to the saved ones at the peak of a layer's backward pass; at least half of the saved bytes.

    The peak of a dense layer is at the gate: gradients of both halves and of the layer's output, with sequence parallelism also
    the gathered gradient of the output. With experts, the peak is while the gradient of their outputs is sorted: two copies of
    this gradient, with ETP also the rank's own part, and two copies of the layer's output gradient. All are in the model's
    dtype, even with FP8; but ETP sums outputs, and gathers their gradient, in the dtype of the router's weights.
    """
    half = saved_by_layer(arch, layer, replace(split, fp8="none"), etp) // 2
    if arch.experts is None or not arch.has_experts(layer):
        outputs = split.whole + (split.tokens if split.sequence_parallel else 0)
        most = split.element * (2 * split.tokens * arch.intermediate_size // split.tp + outputs * arch.hidden_size)
    else:
        routed = _routed(arch.experts, split, etp)
        back = 2 * routed + (routed // etp if etp > 1 else 0)
        element = _weight_bytes(arch.experts, split) if etp > 1 else split.element
        most = (element * back + split.element * 2 * split.whole) * arch.hidden_size
    return max(half, most)


def passes_in_flight(layout: TrainingLayout, stage: int, microbatches: int) -> int:
    """Maximum number of forward passes of model chunks on a stage whose backward pass is pending.

    1F1B: the number of stages from this one on. Interleaved (Narayanan et al., arXiv 2104.04473): two per later stage, plus
    pp * (vpp - 1), plus one.
    """
    if layout.vpp == 1:
        return min(microbatches, layout.pp - stage)
    warmup = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(microbatches * layout.vpp, warmup)


def stage_activations(
    arch: Architecture,
    layout: TrainingLayout,
    stage: int,
    split: Split,
    microbatches: int,
    recomputation: Recomputation,
    *,
    ends_in_bf16: bool = False,
    outputs_freed: bool = False,
) -> int:
    """Peak bytes of activations on a rank of `stage`. ends_in_bf16: whether, with FP8, the first and the last layer are in bf16
    (`fp8.first_last_layers_bf16`). outputs_freed: see below.

    With a pipeline, the schedule also holds the output of each pass until its backward pass, unless Megatron frees it
    (`deallocate_pipeline_outputs`), and two outputs in transit.
    """
    layers = [layer for layer in range(arch.layers) if layout.chunk_of(layer, arch)[0] == stage]
    whole = replace(split, fp8="none")
    chunks: dict[int, list[int]] = {}
    for layer in layers:
        in_bf16 = ends_in_bf16 and layer in (0, arch.layers - 1)
        saved = saved_by_layer(arch, layer, whole if in_bf16 else split, layout.expert_tp)
        beside = beside_recomputed_attention(arch, split) if recomputation.attention else 0
        chunks.setdefault(layout.chunk_of(layer, arch)[1], []).append(saved + beside)
    passes, one = passes_in_flight(layout, stage, microbatches), layer_input(arch, split)
    handed_on = 0
    if layout.pp > 1:  # the last chunk sends no output
        is_alone = layout.vpp == 1 and stage == layout.pp - 1
        handed_on = one * (2 if is_alone or outputs_freed else 2 + passes)
    working = max(gradients_of_layer(arch, layer, split, layout.expert_tp) for layer in layers)
    found = [_kept_of_chunk(saved, recomputation, one, split) for saved in chunks.values()]
    kept, again = sum(bytes_kept for bytes_kept, _ in found), max(more for _, more in found)
    return int(passes / layout.vpp * kept) + again + working + handed_on


def _kept_of_chunk(saved: list[int], recomputation: Recomputation, one: int, split: Split) -> tuple[int, int]:
    """(bytes that a pass of a model chunk keeps, bytes that its backward pass adds to them). saved: by each of its layers. one:
    of a layer's input.

    Recomputed layers are the first ones, so the others' activations are gone when their backward pass begins. A recomputed unit
    saves its input as a reference to the tensor that was kept, so it counts once, unless it was spread over ranks.
    """
    number = recomputation.in_chunk(len(saved))
    units = [sum(saved[first : min(number, first + recomputation.unit)]) for first in range(0, number, recomputation.unit)]
    rest, own = sum(saved[number:]), one // split.tp if recomputation.spread else one
    again = max(units, default=0) - rest - (0 if recomputation.spread else own)
    return len(units) * own + rest, max(0, again)


def head_bytes(arch: Architecture, split: Split, chunk_rows: int, *, own_sum: bool = False) -> int:
    """Bytes of the head and loss on the last stage: the last norm's input and output, the loss rows with their gradient in
    fp32, and the logits of a chunk. Counts every token as a loss row.

    own_sum: the gradient buffer is not fp32, so the head sums its weight gradient in a separate fp32 tensor.
    """
    from etr_megatron.weights import padded_vocab_size

    norm, rows = layer_input(arch, split), split.tokens * arch.hidden_size
    vocab = padded_vocab_size(arch.vocab_size, split.tp) // split.tp
    chunk = _chunk_bytes(split, chunk_rows, vocab)
    total = 4 * vocab * arch.hidden_size if own_sum else 0
    return 2 * norm + rows * (split.element + 4) + chunk + total


def _chunk_bytes(split: Split, chunk_rows: int, vocab: int) -> int:
    """Bytes of a head chunk on a GPU: fp32 logits, twice with TP, and their gradient in the model's dtype. vocab: per rank."""
    buffers = 2 if split.tp > 1 else 1
    return min(chunk_rows, split.tokens) * vocab * (4 * buffers + split.element)
