"""Report NaN or infinity: at an active token, with sample, position and rank, or else in a gradient of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from etr_megatron import platform
from etr_megatron.errors import UserError
from etr_megatron.objective import LossInputs
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.policy.batch import PolicyBatch
from etr_megatron.policy.packing import Microbatch


class NonFiniteDetector:
    """Looks for NaN and infinity in a policy loss, its inputs, and its gradients with respect to log-prob and entropy.

    One per microbatch and rank. Gradients of a token-local loss arrive chunk by chunk inside the head; gradients of other
    losses arrive in Megatron's backward pass. Reading a value would make the host wait for the device, so everything is only
    flagged on the device; `check_finite` reads the flags of all microbatches at once.
    """

    def __init__(self, batch: PolicyBatch, micro: Microbatch, *, loss: str, rank: int) -> None:
        self._batch, self._micro, self._loss, self._rank = batch, micro, loss, rank
        self._losses_error = UserError if ":" in loss else FloatingPointError
        self._broken = torch.zeros(2, len(micro.targets), dtype=torch.bool, device=micro.targets.device)
        self._inputs: dict[str, Tensor] = {}
        self._value = torch.zeros((), device=micro.targets.device)

    def watch(self, rows: slice, logp: Tensor, entropy: Tensor) -> None:
        """Watch the gradients of these rows' values."""
        for place, values in enumerate((logp, entropy)):
            if values.requires_grad:
                values.register_hook(partial(self._flag_gradient, place, rows))

    def _flag_gradient(self, place: int, rows: slice, gradient: Tensor | None) -> None:
        if gradient is not None:  # autograd calls the hook even if the loss does not depend on it
            self._broken[place, rows] = ~torch.isfinite(gradient)

    def record(self, inputs: LossInputs, loss: Tensor) -> None:
        """Watch all rows of the microbatch, the policy's values filled in, and the loss, a scalar. Both are kept, detached."""
        self._inputs = {name: values.detach() for name, values in inputs.row_tensors().items()}
        self._value = loss.detach()

    def flags(self) -> Tensor:
        """bool [3] on the device: whether an input, a gradient and the loss are not finite."""
        inputs = torch.stack([*self._inputs.values()]) if self._inputs else self._value
        return torch.stack([~torch.isfinite(inputs).all(), self._broken.any(), ~torch.isfinite(self._value)])

    def raise_error(self) -> None:
        """Raise the error of what is not finite: first an input, then a gradient, then the loss."""
        named = self._inputs  # empty if the microbatch was not completed
        broken = ~torch.isfinite(torch.stack([*named.values()])) if named else torch.zeros(1, 0, dtype=torch.bool)
        if bool(broken.any()):
            # In row order: the first bad token with its first bad input is more informative than the first bad input.
            row, number = broken.T.nonzero()[0].tolist()
            name = list(named)[number]
            raise FloatingPointError(f"{name} is {named[name][row].item()} at an active token: {self._place(row)}")
        if bool(self._broken.any()):
            row, place = self._broken.T.nonzero()[0].tolist()
            raise self._losses_error(
                f"the gradient of objective.loss {self._loss} with respect to {('logp', 'entropy')[place]} is not finite "
                f"although all of its inputs are: {self._place(row)}"
            )
        samples = ", ".join(self._batch.names[i] for i in self._micro.samples)
        where = f"samples {samples}" if samples else "a microbatch without rows, whose mean is NaN"
        raise self._losses_error(
            f"objective.loss {self._loss} is {self._value.item()} although all of its inputs are finite: {where}, on rank "
            f"{self._rank}"
        )

    def _place(self, row: int) -> str:
        sample, position = int(self._micro.row_sample[row]), int(self._micro.row_position[row])
        if mask := self._batch.sequences[sample].loss_mask:  # from the position among generated tokens to that in the response
            position = [place for place, is_drawn in enumerate(mask) if is_drawn][position]
        return f"position {position} in the response of sample {self._batch.names[sample]}, on rank {self._rank}"


def any_non_finite(detectors: Sequence[NonFiniteDetector]) -> Tensor:
    """int32 scalar on the rank's device: 1 if one of the detectors has seen NaN or infinity. Reads nothing from the device."""
    if not detectors:
        return torch.zeros((), dtype=torch.int32, device=platform.device())
    return torch.stack([one.flags() for one in detectors]).any().int()


def check_finite(detectors: Sequence[NonFiniteDetector]) -> None:
    """Raise if one of the detectors has seen NaN or infinity, for the first that has; reads once from the device.

    A custom loss that turns finite inputs into a non-finite result raises UserError, anything else FloatingPointError. The
    error names the input, the sample, the token's position in the response (from 0) and the rank.
    """
    if not detectors:
        return
    for detector, is_broken in zip(detectors, torch.stack([one.flags() for one in detectors]).any(1).tolist(), strict=True):
        if is_broken:
            detector.raise_error()


def check_gradients_finite(chunks: Sequence[DistributedDataParallel]) -> None:
    """Raise RuntimeError on every rank if a rank's reduced gradients are not finite, with the name of the first. A collective;
    reads once from the device.

    Megatron's own check (`check_for_nan_in_grad`) reads twice per bucket. With `train.overlap_grad_reduce` it does so in the
    backward pass, so that a rank that NaN has travelled to would end before another rank could name the token.
    """
    groups = [group for chunk in chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    norms = [bucket.grad_data.norm().float() for group in groups for bucket in group.buckets]
    is_broken = torch.zeros((), dtype=torch.int32, device=platform.device())
    if norms:
        is_broken = (~torch.isfinite(torch.stack(norms))).any().int()
    dist.all_reduce(is_broken, op=dist.ReduceOp.MAX)
    if is_broken.item():
        on_all_ranks(lambda: _raise_gradient_error(chunks))
        raise RuntimeError("the norm of the weights' gradients is not finite")


def _raise_gradient_error(chunks: Sequence[DistributedDataParallel]) -> None:
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                raise RuntimeError(f"the gradient of {name} is not finite, although those of the loss are")
