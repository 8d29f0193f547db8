"""The policy and its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = "tiny"
    """Directory of a HuggingFace checkpoint (Llama 3, Mistral, Qwen2/2.5, Qwen3, Qwen3-MoE) or of what `tools/convert_hf.py
    to-megatron` wrote, or `tiny`: a small Qwen3 made and warm-started here."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Parameter type; `auto` is float32 on CPU and bfloat16 on CUDA."""


@dataclass(frozen=True)
class TinyConfig:
    """The generated policy of `model.path: tiny` and its supervised warm start."""

    hidden_size: int = 64
    """Width of the residual stream."""
    layers: int = 3
    """Transformer layers."""
    heads: int = 4
    """Attention heads; key/value heads are half as many."""
    head_dim: int = 24
    """Width of one head; need not be `hidden_size / heads`."""
    intermediate_size: int = 192
    """Width of the gated MLP."""
    vocab_size: int = 320
    """Largest size of the byte-level BPE vocabulary (special tokens and 256 bytes included)."""
    warm_start_steps: int = 700
    """Supervised optimizer steps on generated problems; fewer leave more for RL to do."""
    warm_start_batch: int = 64
    """Sequences in a supervised step."""
    warm_start_lr: float = 3e-3
    """Peak learning rate of the warm start (cosine to zero)."""
    forgotten_carry: float = 0.65
    """Share of carries and borrows that the demonstrations forget: a mistake that the warm start teaches and RL has to
    mend; above 0.5 greedy decoding makes it too."""
    wrong_digit: float = 0.0
    """Share of columns whose result the demonstrations write one off."""
    warm_start_seed: int = 0
    """Apart from `run.seed`, so that several RL seeds share one start."""
    cache_dir: str = ".cache"
    """Where finished warm starts are kept, keyed by these settings."""


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the policy; data parallelism is what is left of the world size."""

    tp: int | Literal["auto"] = "auto"
    """Tensor parallel size; `auto` is min(2, world size / (pp x cp))."""
    pp: int = 1
    """Pipeline parallel size."""
    vpp: int = 1
    """Model chunks of a pipeline stage (interleaved schedule, needs pp > 1): a smaller bubble for more communication."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage, which has the embedding as well; null is an even share."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage, which has the head and the loss as well; null is an even share."""
    cp: int = 1
    """Context parallel size: ranks that share the tokens of every sequence."""
    # No all_gather: Transformer Engine has it for padded batches alone before 2.18, and ours are packed.
    cp_comm: Literal["p2p", "a2a"] = "p2p"
    """How Transformer Engine exchanges over context-parallel ranks: keys and values in a ring, or heads for tokens (a2a: cp
    must divide the key/value heads of a tensor-parallel rank). On CPU keys and values are gathered."""
    ep: int = 1
    """Expert parallel size: ranks of a pipeline stage that a layer's experts are spread over (models with experts)."""
    etp: int | None = None
    """Tensor parallel size of a single expert; null is `tp`."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions over the sequence (needs tp > 1)."""
