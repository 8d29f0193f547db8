"""Converts HuggingFace checkpoints to Megatron's torch_dist format and back, part by part. Only `verify` needs Megatron."""

from etr_megatron.convert.comparison import verify
from etr_megatron.convert.directories import check_directories
from etr_megatron.convert.hf_to_megatron import to_megatron
from etr_megatron.convert.megatron_to_adapter import to_adapter
from etr_megatron.convert.megatron_to_hf import to_hf
from etr_megatron.convert.ranks import Ranks
from etr_megatron.convert.watch import detecting_silent_ranks

__all__ = ["Ranks", "check_directories", "detecting_silent_ranks", "to_adapter", "to_hf", "to_megatron", "verify"]
