"""Bytes that forward passes keep for backward passes, by counting the tensors that a layer saves.

After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), with the tensors
of this decoder: grouped-query attention without a stored score matrix (flash attention), RMSNorm, a gated MLP, no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, TrainingLayout

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

    Two norms keep input and output, the projections their inputs, attention q, k, v, its output and a log-sum-exp per head,
    the gated MLP both halves and their product. In FP8 what matrix products alone keep is their own copy.
    """
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    normed = q + kv if arch.qk_norm else 0
    attention = split.tokens * (2 * q + 2 * kv + normed) // split.tp
    softmax = 4 * split.tokens * arch.heads // split.tp
    norm = split.whole * arch.hidden_size
    kept, inputs = _mlp(arch, layer, split, etp)
    kept, inputs = kept + attention + 2 * norm, inputs + norm
    if split.fp8 == "none":
        return split.element * (kept + inputs) + softmax
    if split.fp8 == "delayed":
        # Attention keeps its output in the model's type. With other recipes Megatron has the projection behind it use that
        # one (set_save_original_input in transformer/attention.py).
        inputs += split.tokens * q // split.tp
    return split.element * kept + int(FP8_BYTES[split.fp8] * inputs) + softmax


def _mlp(arch: Architecture, layer: int, split: Split, etp: int) -> tuple[int, int]:
    """(elements that are kept whatever the products, inputs of products that nothing else keeps), with the output of the norm
    before. Of experts also the tokens brought to them and, for the router's gradient, what comes back; the router, which is
    not in FP8, keeps the norm's output."""
    experts, norm = arch.experts, split.whole * arch.hidden_size
    if experts is None or not arch.has_experts(layer):
        product = split.tokens * arch.intermediate_size // split.tp
        return 2 * product, norm + product
    # Sequence parallelism spreads tokens over TP; a token goes to `per_token` experts, wherever they are.
    routed = int(split.whole * experts.per_token * etp * EXPERT_IMBALANCE)
    product = routed * experts.intermediate_size // etp
    back = routed * arch.hidden_size
    return norm + back + 2 * product + 3 * split.whole * experts.count, back + product


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

    `selective` recomputes attention alone, of which flash attention stores nothing worth mentioning: it counts like `none`.
    """
    layers = [layer for layer in range(arch.layers) if layout.chunk_of(layer, arch)[0] == stage]
    whole = replace(split, fp8="none")
    saved = [
        saved_by_layer(arch, layer, whole if ends_in_bf16 and layer in (0, arch.layers - 1) else split, layout.expert_tp)
        for layer in layers
    ]
    flights = passes_in_flight(layout, stage, microbatches) / layout.vpp
    # The layer that goes backward has its gradients beside what it saved, about half as much again.
    working = max(saved) // 2
    if recompute == "full":
        return int(flights * len(layers) * layer_input(arch, split)) + max(saved) + working
    return int(flights * sum(saved)) + working


def head_bytes(arch: Architecture, split: Split, chunk_rows: int, *, own_sum: bool = False) -> int:
    """Bytes of the head and loss on the last stage: hidden states gathered over the sequence with their gradient, the loss
    rows' with theirs in fp32, and the chunk's logits: in fp32, twice with TP, and their gradient in the model's type.

    own_sum: the gradient buffer is not fp32, so that the head sums its weight's gradient beside it, in fp32, and hands it over
    in the model's type. Every token is counted as a loss row.
    """
    from etr_megatron.weights import padded_vocab_size

    hidden = split.tokens * arch.hidden_size * (3 * split.element + 4)
    vocab = padded_vocab_size(arch.vocab_size, split.tp) // split.tp
    buffers = 2 if split.tp > 1 else 1
    gradient = vocab * arch.hidden_size * (4 + split.element) if own_sum else 0
    return hidden + min(chunk_rows, split.tokens) * vocab * (4 * buffers + split.element) + gradient
