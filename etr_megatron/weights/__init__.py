"""Weights: one table per model family, and what follows from it. No Megatron in here; `policy` brings its parameters."""

from etr_megatron.weights.architecture import FAMILIES, Architecture, read_architecture
from etr_megatron.weights.map import TABLES, Weight, padded_vocab_size, to_te_name, weights_of
from etr_megatron.weights.safetensors_dir import SafetensorsDir, check_checkpoint
from etr_megatron.weights.shard import join_shards, read_shard, shard_shape

__all__ = [
    "FAMILIES",
    "TABLES",
    "Architecture",
    "SafetensorsDir",
    "Weight",
    "check_checkpoint",
    "join_shards",
    "padded_vocab_size",
    "read_architecture",
    "read_shard",
    "shard_shape",
    "to_te_name",
    "weights_of",
]
