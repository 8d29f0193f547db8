"""Bytes that forward passes keep for backward passes, by counting the tensors that a layer saves.

After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), with the tensors
of this decoder: grouped-query attention without a stored score matrix (flash attention), RMSNorm, a gated MLP, no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, TrainingLayout

EXPERT_IMBALANCE = 1.25
"""Assumed: tokens of the rank whose experts are chosen most, over an even share."""


@dataclass(frozen=True)
class Split:
    """How the tokens of a microbatch and the width of a layer are spread over ranks.

    tokens: of a context-parallel rank. element: bytes of an activation.
    """

    tokens: int
    tp: int
    sequence_parallel: bool
    element: int

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
    the gated MLP both halves and their product.
    """
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    normed = q + kv if arch.qk_norm else 0
    attention = split.tokens * (2 * q + 2 * kv + normed) // split.tp
    softmax = 4 * split.tokens * arch.heads // split.tp
    between = 4 * split.whole * arch.hidden_size
    return split.element * (between + attention + _mlp(arch, layer, split, etp)) + softmax


def _mlp(arch: Architecture, layer: int, split: Split, etp: int) -> int:
    """Elements. Of experts also the tokens brought to them and, for the router's gradient, what comes back."""
    experts = arch.experts
    if experts is None or not arch.has_experts(layer):
        return 3 * split.tokens * arch.intermediate_size // split.tp
    # Sequence parallelism spreads tokens over TP; a token goes to `per_token` experts, wherever they are.
    routed = int(split.whole * experts.per_token * etp * EXPERT_IMBALANCE)
    return routed * (2 * arch.hidden_size + 3 * experts.intermediate_size // etp) + 3 * split.whole * experts.count


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
    arch: Architecture, layout: TrainingLayout, stage: int, split: Split, microbatches: int, recompute: str
) -> int:
    """Bytes that a rank of `stage` holds when it holds most. recompute: `train.recompute`.

    `selective` recomputes attention alone, of which flash attention stores nothing worth mentioning: it counts like `none`.
    """
    layers = [layer for layer in range(arch.layers) if layout.chunk_of(layer, arch)[0] == stage]
    saved = [saved_by_layer(arch, layer, split, layout.expert_tp) for layer in layers]
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
