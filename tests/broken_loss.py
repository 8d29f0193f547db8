"""A user's policy loss with the usual mistake: a root whose derivative at zero is infinite, and NaN after `where`."""

from __future__ import annotations

import torch
import torch.distributed as dist

from etr_megatron.objective import LossInputs, LossOutputs, regularized, token_local


@token_local
def root_of_zero(inputs: LossInputs) -> LossOutputs:
    """On the rank `rank` of `objective.options` the gradient of every first token of a chunk is NaN; all values are finite."""
    surrogate = inputs.logp * inputs.advantage
    if dist.get_rank() == inputs.settings.options["rank"]:
        root = (inputs.logp - inputs.logp.detach()).abs().sqrt()
        surrogate = surrogate + torch.where(torch.arange(len(root)) == 0, root, 0.0)
    return regularized(inputs, surrogate)


def root_of_zero_unmarked(inputs: LossInputs) -> LossOutputs:
    """The same without the promise, so that its gradients are formed when Megatron goes backward."""
    return root_of_zero(inputs)
