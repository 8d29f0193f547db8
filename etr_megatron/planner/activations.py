"""Bytes that forward passes keep for backward passes, by counting the tensors that a layer saves.

After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), with the tensors
of this decoder: grouped-query attention without a stored score matrix (flash attention), RMSNorm, a gated MLP, no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, Experts, TrainingLayout

FP8_BYTES = {"blockwise": 1 + 4 / 128, "tensorwise": 1.0, "delayed": 1.0, "mxfp8": 1 + 1 / 32}
"""Bytes of an element of a matrix product's input that Transformer Engine keeps for the weight's gradient, scales included.

In 2.11 it keeps one copy of the two that it makes, the one scaled by columns (with sequence parallelism, where a scale is a
tensor's, the one by rows, which alone can be gathered): `update_usage` at the end of the forward passes of
pytorch/module/linear.py, layernorm_linear.py and grouped_linear.py. Scales: an fp32 one for 128 values
(Float8BlockQuantizer.get_scale_shape), a byte for 32 (MXFP8), one for a tensor.
"""

EXPERT_IMBALANCE = 1.25
"""Assumed: tokens of the rank whose experts are chosen most, over an even share."""


@dataclass(frozen=True)
class Split:
    """How the tokens of a microbatch and the width of a layer are spread over ranks.

    tokens: of a context-parallel rank. element: bytes of an activation. fp8: `fp8.recipe`.
    """

    tokens: int
    tp: int
    sequence_parallel: bool
    element: int
    fp8: str = "none"

    @property
    def whole(self) -> int:
        """Tokens of a tensor of full width: those between the tensor-parallel regions."""
        return -(-self.tokens // self.tp) if self.sequence_parallel else self.tokens


def layer_input(arch: Architecture, split: Split) -> int:
    """Bytes of what a layer gets, which is all that full recomputation keeps."""
    return split.whole * arch.hidden_size * split.element


def saved_by_layer(arch: Architecture, layer: int, split: Split, etp: int) -> int:
    """Bytes that a layer keeps. etp: tensor parallelism of an expert.

    Two norms keep input and output, those of q and k their inputs, the projections theirs, attention q, k, v and its output,
    the gated MLP both halves and their product. In fp32 every normed row has a scale and every head of a token a log-sum-exp.
    In FP8 what matrix products alone keep is their own copy.
    """
    heads, kv_heads = arch.heads // split.tp, arch.kv_heads_of_a_rank(split.tp)
    normed = heads + kv_heads if arch.qk_norm else 0
    attention = split.tokens * arch.head_dim * (2 * heads + 2 * kv_heads + normed)
    apart = 4 * (2 * split.whole + split.tokens * (heads + normed)) + _routing(arch, layer, split, etp)
    norm = split.whole * arch.hidden_size
    kept, inputs = _mlp(arch, layer, split, etp)
    kept, inputs = kept + attention + 2 * norm, inputs + norm
    if split.fp8 == "none":
        return split.element * (kept + inputs) + apart
    if split.fp8 == "delayed":
        # Attention keeps its output in the model's type. With other recipes Megatron has the projection behind it use that
        # one (set_save_original_input in transformer/attention.py).
        inputs += split.tokens * heads * arch.head_dim
    return split.element * kept + int(FP8_BYTES[split.fp8] * inputs) + apart


def _mlp(arch: Architecture, layer: int, split: Split, etp: int) -> tuple[int, int]:
    """(elements that are kept whatever the products, inputs of products that nothing else keeps), with the output of the norm
    before. Of experts also the tokens brought to them; the router, which is not in FP8, keeps the norm's output. What comes
    back is not kept: the router's weights have been multiplied into the gate's product (`WeightedSwiGLUFunction`)."""
    experts, norm = arch.experts, split.whole * arch.hidden_size
    if experts is None or not arch.has_experts(layer):
        product = split.tokens * arch.intermediate_size // split.tp
        return 2 * product, norm + product
    routed = _routed(experts, split, etp)
    product = routed * experts.intermediate_size // etp
    return norm + 2 * product, routed * arch.hidden_size + product


def _routed(experts: Experts, split: Split, etp: int) -> int:
    """Tokens that a rank's experts are given: sequence parallelism spreads tokens over TP, and each goes to `per_token`
    experts, wherever they are."""
    return int(split.whole * experts.per_token * etp * EXPERT_IMBALANCE)


def _routing(arch: Architecture, layer: int, split: Split, etp: int) -> int:
    """Bytes of a router's choice, none of a dense layer: of every expert whether a token goes there and with what weight, of
    the chosen ones two indices in 64 bits; the softmax in fp32, of the chosen ones' logits or, where they are not normalised,
    of all; a weight for every token that the rank's experts are given."""
    experts = arch.experts
    if experts is None or not arch.has_experts(layer):
        return 0
    logits = experts.per_token if experts.normalized else experts.count
    choice = experts.count * (1 + split.element) + 2 * 8 * experts.per_token + 4 * logits
    return split.whole * choice + _routed(experts, split, etp) * split.element


def beside_recomputed_attention(arch: Architecture, split: Split) -> int:
    """Bytes that a layer keeps more with `train.recompute: selective`. Recomputed is attention alone, whose scores flash
    attention does not store: it saves a log-sum-exp. What is kept is v as it lies in the projection's output, and so all of
    that output, where attention itself would keep a copy of v. Ranks that share a key/value head have gathered the outputs of
    all."""
    heads, kv_heads = arch.heads // split.tp, arch.kv_heads_of_a_rank(split.tp)
    output = heads + 2 * kv_heads if arch.kv_heads >= split.tp else arch.heads + 2 * arch.kv_heads
    return split.tokens * (split.element * (output - kv_heads) * arch.head_dim - 4 * heads)


def gradients_of_layer(arch: Architecture, layer: int, split: Split, etp: int) -> int:
    """Bytes beside what a layer saved when its backward pass holds most, at least half as much again.

    That is at the gate, with the gradients of its halves and of the layer's output, with sequence parallelism also gathered;
    with experts while the gradient of what came back is sorted, when there are two of it, with ETP also a rank's own part, and
    two of the layer's output. They are in the model's type, in FP8 too.
    """
    half = saved_by_layer(arch, layer, replace(split, fp8="none"), etp) // 2
    if arch.experts is None or not arch.has_experts(layer):
        outputs = split.whole + (split.tokens if split.sequence_parallel else 0)
        most = 2 * split.tokens * arch.intermediate_size // split.tp + outputs * arch.hidden_size
    else:
        routed = _routed(arch.experts, split, etp)
        back = 2 * routed + (routed // etp if etp > 1 else 0)
        most = (back + 2 * split.whole) * arch.hidden_size
    return max(half, split.element * most)


def passes_in_flight(layout: TrainingLayout, stage: int, microbatches: int) -> int:
    """Forward passes of model chunks that a stage has not gone backward through yet, at most.

    1F1B: as many as there are stages from this one on. Interleaved (Narayanan et al., arXiv 2104.04473): two for every stage
    behind, all chunks but one of every stage, and one.
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
    recompute: str,
    *,
    ends_in_bf16: bool = False,
) -> int:
    """Bytes that a rank of `stage` holds when it holds most. recompute: `train.recompute`. ends_in_bf16: whether the first and
    the last layer are, in FP8 (`fp8.first_last_layers_bf16`).

    Of a pipeline the schedule holds what a pass has handed on, until it is gone backward through, and two on their way.
    """
    layers = [layer for layer in range(arch.layers) if layout.chunk_of(layer, arch)[0] == stage]
    whole = replace(split, fp8="none")
    saved = [
        saved_by_layer(arch, layer, whole if ends_in_bf16 and layer in (0, arch.layers - 1) else split, layout.expert_tp)
        for layer in layers
    ]
    if recompute == "selective":
        saved = [each + beside_recomputed_attention(arch, split) for each in saved]
    passes = passes_in_flight(layout, stage, microbatches)
    flights, one = passes / layout.vpp, layer_input(arch, split)
    handed_on = 0
    if layout.pp > 1:  # the last chunk hands on nothing
        handed_on = one * (2 if layout.vpp == 1 and stage == layout.pp - 1 else 2 + passes)
    working = max(gradients_of_layer(arch, layer, split, layout.expert_tp) for layer in layers)
    if recompute == "full":
        # The layer that is computed again saves its input, which was kept, once more under the same address.
        return int(flights * len(layers) * one) + max(saved) - one + working + handed_on
    return int(flights * sum(saved)) + working + handed_on


def head_bytes(arch: Architecture, split: Split, chunk_rows: int, *, own_sum: bool = False) -> int:
    """Bytes of the head and loss on the last stage: what the last norm got and gave, the loss rows with their gradient in fp32,
    and the logits of a chunk. Every token is counted as a loss row.

    own_sum: the gradient buffer is not fp32, so that the head sums its weight's gradient beside it, in fp32, and hands it and
    the rows' over in the model's type. It does so in the backward pass, when the last norm's output is gone.
    """
    from etr_megatron.weights import padded_vocab_size

    norm, rows = layer_input(arch, split), split.tokens * arch.hidden_size
    vocab = padded_vocab_size(arch.vocab_size, split.tp) // split.tp
    chunk = _chunk_bytes(split, chunk_rows, vocab)
    if not own_sum:
        return 2 * norm + rows * (split.element + 4) + chunk
    total = vocab * arch.hidden_size
    handing_over = (total + rows) * split.element
    return norm + rows * (split.element + 4) + 4 * total + max(chunk, handing_over)


def _chunk_bytes(split: Split, chunk_rows: int, vocab: int) -> int:
    """Of the head's chunk on a GPU: logits in fp32, twice with TP, and their gradient in the model's type. vocab: of a rank."""
    buffers = 2 if split.tp > 1 else 1
    return min(chunk_rows, split.tokens) * vocab * (4 * buffers + split.element)
