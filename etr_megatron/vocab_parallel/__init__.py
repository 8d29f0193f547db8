"""Log-probs, entropies and token-local losses from hidden states and a vocabulary shard."""

from etr_megatron.vocab_parallel.logprob import vocab_parallel_logprob
from etr_megatron.vocab_parallel.loss import TokenLoss, single_pass_bytes, vocab_parallel_loss
from etr_megatron.vocab_parallel.shard import VocabShard

__all__ = ["TokenLoss", "VocabShard", "single_pass_bytes", "vocab_parallel_logprob", "vocab_parallel_loss"]
