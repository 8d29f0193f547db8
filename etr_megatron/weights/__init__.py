"""Weights: one table per model family, and what follows from it. No Megatron in here; `policy` brings its parameters."""

from etr_megatron.weights.architecture import FAMILIES, Architecture, Experts, read_architecture
from etr_megatron.weights.layout import Holding, Placement, ServerLayout, TrainingLayout
from etr_megatron.weights.map import TABLES, Weight, weights_of
from etr_megatron.weights.safetensors_dir import SafetensorsDir, check_checkpoint
from etr_megatron.weights.shards import Piece, Shard, join_shards, megatron_shard, padded_vocab_size, read_shard, server_shard

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
    "TrainingLayout",
    "Weight",
    "check_checkpoint",
    "join_shards",
    "megatron_shard",
    "padded_vocab_size",
    "read_architecture",
    "read_shard",
    "server_shard",
    "weights_of",
]
