"""Weights: one table per model family, and everything derived from it. Megatron is not imported here; see `policy` for that."""

from etr_megatron.weights.adapter_dir import AdapterDir, Merged
from etr_megatron.weights.architecture import (
    FAMILIES,
    Architecture,
    Experts,
    LatentAttention,
    read_architecture,
    tiny_architecture,
)
from etr_megatron.weights.boxes import BoxSource
from etr_megatron.weights.check import check_checkpoint, check_safetensors, check_torch_dist, stored_shapes
from etr_megatron.weights.fp8_dir import open_checkpoint
from etr_megatron.weights.hf_boxes import HfBoxes
from etr_megatron.weights.layout import ServerLayout, TrainingLayout, WeightLayout, shards_of
from etr_megatron.weights.low_rank import Adapter, LowRank
from etr_megatron.weights.map import TABLES, Weight, weights_of
from etr_megatron.weights.quantize import quantize_blocks
from etr_megatron.weights.reshard import make_reshard_plan
from etr_megatron.weights.run_checkpoint import holds_adapters, refuse_adapters
from etr_megatron.weights.safetensors_dir import SafetensorsDir
from etr_megatron.weights.shards import Shard, join_shards, megatron_shard, padded_vocab_size, read_shard, server_shard
from etr_megatron.weights.torch_dist_dir import TorchDistDir, is_torch_dist

__all__ = [
    "FAMILIES",
    "TABLES",
    "Adapter",
    "AdapterDir",
    "Architecture",
    "BoxSource",
    "Experts",
    "HfBoxes",
    "LatentAttention",
    "LowRank",
    "Merged",
    "SafetensorsDir",
    "ServerLayout",
    "Shard",
    "TorchDistDir",
    "TrainingLayout",
    "Weight",
    "WeightLayout",
    "check_checkpoint",
    "check_safetensors",
    "check_torch_dist",
    "holds_adapters",
    "is_torch_dist",
    "join_shards",
    "make_reshard_plan",
    "megatron_shard",
    "open_checkpoint",
    "padded_vocab_size",
    "quantize_blocks",
    "read_architecture",
    "read_shard",
    "refuse_adapters",
    "server_shard",
    "shards_of",
    "stored_shapes",
    "tiny_architecture",
    "weights_of",
]
