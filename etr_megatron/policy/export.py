"""The policy's weights as whoever takes them over sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from etr_megatron.policy.model import export_hf_weights, own_parameters, plain_values
from etr_megatron.weights import TrainingLayout

if TYPE_CHECKING:
    from etr_megatron.policy.policy import Policy


class Export:
    """Weights as they are at the time of each call. Shards are views into the policy, which the next optimizer step changes;
    the full tensors of an iteration are copies."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.layout: TrainingLayout = policy.layout.training

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Full HF tensors by name, see `export_hf_weights`."""
        return export_hf_weights(self._policy.chunks)

    def shards(self) -> dict[str, Tensor]:
        """This rank's parameters by `Weight.megatron`; of one held in FP8 a copy in the type that it stands for."""
        own = own_parameters(self._policy.chunks).values()
        return {weight.megatron: plain_values(parameter) for weight, parameter in own}

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, ...]:
        """See `TokenLogprobs.logp`; a collective."""
        return self._policy.logprobs(sequences).logp
