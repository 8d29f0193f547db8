"""The policy's weights as their consumers see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from etr_megatron.policy.model import export_hf_weights, own_parameters, plain_values
from etr_megatron.types import AnySequence
from etr_megatron.weights import TrainingLayout

if TYPE_CHECKING:
    from etr_megatron.policy.policy import Policy


class Export:
    """The weights at the time of each call. Shards are views of the policy's parameters: the next optimizer step changes them,
    and with adapters so does the computation of reference log-probs, while it runs. Iteration yields full tensors as copies."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.layout: TrainingLayout = policy.layout.training

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Full HF tensors by name, see `export_hf_weights`."""
        return export_hf_weights(self._policy.chunks)

    def shards(self) -> dict[str, Tensor]:
        """This rank's parameters by `Weight.megatron`; an FP8 parameter as a dequantized copy."""
        own = own_parameters(self._policy.chunks).values()
        return {weight.megatron: plain_values(parameter) for weight, parameter in own}

    def logprobs(self, sequences: Sequence[AnySequence]) -> tuple[Tensor, ...]:
        """See `TokenLogprobs.logp`; a collective."""
        return self._policy.logprobs(sequences).logp
