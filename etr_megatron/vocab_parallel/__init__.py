"""Log-prob and entropy from hidden states and a vocabulary shard."""

from etr_megatron.vocab_parallel.logprob import VocabShard, vocab_parallel_logprob

__all__ = ["VocabShard", "vocab_parallel_logprob"]
