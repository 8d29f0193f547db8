"""The policy and its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = "tiny"
    """Directory of a HuggingFace checkpoint (Llama 3, Mistral, Qwen2/2.5, Qwen3, Qwen3-MoE, GLM-4.5), or of one that
    `tools/convert_hf.py to-megatron` wrote. `tiny`: a small Qwen3 that the job creates and warm-starts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the parameters; `auto` is float32 on CPU and bfloat16 on CUDA."""


@dataclass(frozen=True)
class TinyConfig:
    """The policy that `model.path: tiny` creates, and its supervised warm start."""

    hidden_size: int = 64
    """Width of the residual stream."""
    layers: int = 3
    """Transformer layers."""
    heads: int = 4
    """Attention heads; there are half as many key/value heads."""
    head_dim: int = 24
    """Width of a head; may differ from `hidden_size / heads`."""
    intermediate_size: int = 192
    """Width of the gated MLP."""
    vocab_size: int = 320
    """Maximum size of the byte-level BPE vocabulary, including special tokens and 256 bytes."""
    warm_start_steps: int = 700
    """Supervised optimizer steps on generated problems; fewer steps leave more to RL."""
    warm_start_batch: int = 64
    """Sequences per supervised step."""
    warm_start_lr: float = 3e-3
    """Peak learning rate of the warm start (cosine decay to zero)."""
    forgotten_carry: float = 0.65
    """Share of carries and borrows that the demonstrations forget. The warm start teaches this mistake, and RL corrects it;
    above 0.5, greedy decoding makes it too."""
    wrong_digit: float = 0.0
    """Share of columns whose result is off by one in the demonstrations."""
    warm_start_seed: int = 0
    """Seed of the warm start, independent of `run.seed`, so that several RL seeds share one start."""
    cache_dir: str = ".cache"
    """Directory of finished warm starts, keyed by these settings."""


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the policy. The rest of the world size is data parallelism."""

    tp: int | Literal["auto"] = "auto"
    """Tensor parallel size; `auto` is min(2, world size / (pp x cp))."""
    pp: int = 1
    """Pipeline parallel size."""
    vpp: int = 1
    """Model chunks per pipeline stage (interleaved schedule; needs pp > 1): a smaller bubble, but more communication."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage, which also has the embedding; null is an even share."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage, which also has the head and the loss; null is an even share."""
    cp: int = 1
    """Context parallel size: ranks that split the tokens of every sequence."""
    # No all_gather: before 2.18, Transformer Engine has it only for padded batches, and ours are packed.
    cp_comm: Literal["p2p", "a2a"] = "p2p"
    """What Transformer Engine exchanges over context-parallel ranks. `p2p`: keys and values, in a ring. `a2a`: heads for
    tokens; cp must divide the key/value heads of a tensor-parallel rank, and values must not be narrower than keys, as in
    DeepSeek-V3. On CPU, keys and values are gathered."""
    ep: int = 1
    """Expert parallel size: ranks of a pipeline stage that split a layer's experts (models with experts)."""
    etp: int | None = None
    """Tensor parallel size of an expert; null is `tp`."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence (needs tp > 1)."""
