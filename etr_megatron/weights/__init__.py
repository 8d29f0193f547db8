"""Weights: one table per model family, and what follows from it. No Megatron in here; `policy` brings its parameters."""

from etr_megatron.weights.architecture import FAMILIES, Architecture, Experts, read_architecture
from etr_megatron.weights.check import check_checkpoint, check_torch_dist, stored_shapes
from etr_megatron.weights.layout import Holding, Placement, ServerLayout, TrainingLayout
from etr_megatron.weights.map import TABLES, Weight, weights_of
from etr_megatron.weights.safetensors_dir import SafetensorsDir
from etr_megatron.weights.shards import Piece, Shard, join_shards, megatron_shard, padded_vocab_size, read_shard, server_shard
from etr_megatron.weights.torch_dist_dir import TorchDistDir, is_torch_dist

__all__ = [
    "FAMILIES",
    "TABLES",
    "Architecture",
    "Experts",
    "Holding",
    "Piece",
    "Placement",
    "SafetensorsDir",
    "ServerLayout",
    "Shard",
    "TorchDistDir",
    "TrainingLayout",
    "Weight",
    "check_checkpoint",
    "check_torch_dist",
    "is_torch_dist",
    "join_shards",
    "megatron_shard",
    "padded_vocab_size",
    "read_architecture",
    "read_shard",
    "server_shard",
    "stored_shapes",
    "weights_of",
]
