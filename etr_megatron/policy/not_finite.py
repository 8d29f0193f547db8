"""Report NaN or infinity at an active token, with sample, position and rank."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.objective import LossInputs
from etr_megatron.policy.batch import PolicyBatch
from etr_megatron.policy.packing import Microbatch


class RowWatch:
    """Checks a policy loss's inputs, and its gradients with respect to log-prob and entropy, for NaN and infinity.

    One per microbatch and rank. A custom loss that turns finite inputs into a non-finite result raises UserError; anything else
    raises FloatingPointError. Gradients of a token-local loss arrive chunk by chunk inside the head; gradients of other losses
    arrive in Megatron's backward pass. The chunks' gradients are only marked as they arrive and checked later, because reading
    a value synchronizes with the device.
    """

    def __init__(self, batch: PolicyBatch, micro: Microbatch, *, loss: str, rank: int) -> None:
        self._batch, self._micro, self._loss, self._rank = batch, micro, loss, rank
        self._losses_error = UserError if ":" in loss else FloatingPointError
        self._broken = torch.zeros(2, len(micro.targets), dtype=torch.bool, device=micro.row_sample.device)
        self._waits_for_backward = False

    def watch(self, rows: slice, logp: Tensor, entropy: Tensor) -> None:
        """Watch the gradients of these rows' values."""
        for place, values in enumerate((logp, entropy)):
            if values.requires_grad:
                values.register_hook(partial(self._mark, place, rows))

    def _mark(self, place: int, rows: slice, gradient: Tensor | None) -> None:
        if gradient is None:  # autograd calls the hook even if the loss does not depend on it
            return
        self._broken[place, rows] = ~torch.isfinite(gradient)
        if self._waits_for_backward:
            self._check_gradients()

    def check(self, inputs: LossInputs, loss: float) -> None:
        """Raise FloatingPointError if a row of an input is not finite, or the error of `RowWatch` for the loss or its gradient.

        inputs: all rows of the microbatch, the policy's values filled in. The error names the input, the sample, the token's
        position in the response (from 0) and the rank. Later gradients are checked as they arrive.
        """
        named = inputs.row_tensors()
        broken = ~torch.isfinite(torch.stack(list(named.values())))
        if bool(broken.any()):
            # In row order: the first bad token with its first bad input is more informative than the first bad input.
            row, number = broken.T.nonzero()[0].tolist()
            name = list(named)[number]
            raise FloatingPointError(f"{name} is {named[name][row].item()} at an active token: {self._place(row)}")
        self._check_gradients()
        if not torch.isfinite(torch.tensor(loss)):
            samples = ", ".join(self._batch.names[i] for i in self._micro.samples)
            where = f"samples {samples}" if samples else "a microbatch without rows, whose mean is NaN"
            raise self._losses_error(
                f"objective.loss {self._loss} is {loss} although all of its inputs are finite: {where}, on rank {self._rank}"
            )
        self._waits_for_backward = True

    def _check_gradients(self) -> None:
        if not bool(self._broken.any()):
            return
        row, place = self._broken.T.nonzero()[0].tolist()
        raise self._losses_error(
            f"the gradient of objective.loss {self._loss} with respect to {('logp', 'entropy')[place]} is not finite although "
            f"all of its inputs are: {self._place(row)}"
        )

    def _place(self, row: int) -> str:
        sample, position = int(self._micro.row_sample[row]), int(self._micro.row_position[row])
        if mask := self._batch.sequences[sample].loss_mask:  # from the position among drawn tokens to that in the response
            position = [place for place, is_drawn in enumerate(mask) if is_drawn][position]
        return f"position {position} in the response of sample {self._batch.names[sample]}, on rank {self._rank}"
