"""Converts HuggingFace checkpoints to Megatron's torch_dist format and back, part by part. Only `verify` needs Megatron."""

from etr_megatron.convert.comparison import verify
from etr_megatron.convert.hf_to_megatron import to_megatron
from etr_megatron.convert.megatron_to_adapter import to_adapter
from etr_megatron.convert.megatron_to_hf import to_hf
from etr_megatron.convert.named import refuse_mistaken
from etr_megatron.convert.ranks import Ranks
from etr_megatron.convert.watch import watched

__all__ = ["Ranks", "refuse_mistaken", "to_adapter", "to_hf", "to_megatron", "verify", "watched"]
