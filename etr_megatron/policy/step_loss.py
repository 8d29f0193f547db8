"""The policy loss of an optimizer step, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from etr_megatron.config import ObjectiveConfig
from etr_megatron.objective import DiagnosticSums, LossInputs, LossOutputs, PolicyLoss, diagnostic_sums, read_sums
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.policy.batch import PolicyBatch
from etr_megatron.policy.context import summed
from etr_megatron.policy.loss_inputs import loss_inputs, loss_settings, pass_rate_bins_of_samples
from etr_megatron.policy.non_finite import NonFiniteDetector, any_non_finite, check_finite
from etr_megatron.policy.packing import Microbatch
from etr_megatron.policy.parallel import Layout
from etr_megatron.vocab_parallel import vocab_parallel_logprob, vocab_parallel_loss

HeadInputs = Callable[[Tensor, Microbatch], tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]]
"""(the last stage's hidden states, microbatch) -> (hidden states of the loss rows, head weight, targets) and the head's
options."""


class StepLoss:
    """Computes each microbatch's loss on the last pipeline stage, where `run_schedule` calls it.

    It copies nothing to the device between the passes, and reads nothing from it: a host that waits for the device cannot
    launch the next pass. Inputs are on the device before the first pass, and NaN, losses and diagnostics are read after the
    last.
    """

    def __init__(
        self,
        loss: PolicyLoss,
        batch: PolicyBatch,
        micro: Sequence[Microbatch],
        objective: ObjectiveConfig,
        layout: Layout,
        *,
        scale: float,
        head_inputs: HeadInputs,
        try_rows: Callable[[LossInputs], None],
    ) -> None:
        """micro: this rank's microbatches. scale: the optimizer's loss scale, which Megatron applies in the backward pass.
        try_rows: called with each microbatch's inputs, the policy's values filled in."""
        self._loss, self._micro, self._scale, self._head_inputs, self._try_rows = loss, micro, scale, head_inputs, try_rows
        mine = micro if layout.is_last_stage else ()
        reduce = partial(summed, group=mpu.get_context_parallel_group()) if layout.cp > 1 else None
        settings = loss_settings(objective)
        self._known = [loss_inputs(batch, one, settings, reduce) for one in mine]
        self._bins = [pass_rate_bins_of_samples(batch, one) for one in mine]
        self._detectors = [NonFiniteDetector(batch, one, loss=loss.name, rank=layout.rank) for one in mine]

    def __call__(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, DiagnosticSums]]:
        """(loss of microbatch `number`, its tokens, what `read` takes). The loss is already divided by the batch's denominator;
        Megatron ignores the tokens.

        A token-local loss is evaluated chunk by chunk inside the head; a sequence-level loss needs all rows first.
        """
        known, detector = self._known[number], self._detectors[number]
        tensors, options = self._head_inputs(hidden, self._micro[number])
        parts: list[LossOutputs] = []

        def rows_loss(rows: slice, logp: Tensor, entropy: Tensor) -> Tensor:
            detector.watch(rows, logp, entropy)
            parts.append(self._loss(known.at(rows, logp, entropy)))
            return parts[-1].loss

        if self._loss.token_local:
            loss, logp, entropy = vocab_parallel_loss(*tensors, rows_loss, backward_scale=self._scale, **options)
        else:
            logp, entropy = vocab_parallel_logprob(*tensors, **options)
            loss = rows_loss(slice(None), logp, entropy)
        inputs = known.at(slice(None), logp.detach(), entropy.detach())
        detector.record(inputs, loss)
        self._try_rows(inputs)
        own = {name: torch.cat([part.rows[name] for part in parts]) for name in (parts[0].rows if parts else ())}
        bins = self._bins[number][known.sequences.index]
        sums = diagnostic_sums(inputs, LossOutputs(loss.detach(), own), bins)
        tokens = torch.full((), len(known.old_logp), dtype=torch.int, device=loss.device)
        return loss, tokens, (loss.detach(), sums)

    def check_finite(self) -> None:
        """Raise the errors of `non_finite.check_finite` on every rank if there is one on any. A collective.

        NaN travels from the rank of a bad token to others, backwards through the pipeline and between context-parallel ranks.
        There it would be found in gradients only, without a token.
        """
        is_broken = any_non_finite(self._detectors)
        dist.all_reduce(is_broken, op=dist.ReduceOp.MAX)
        if is_broken.item():
            on_all_ranks(lambda: check_finite(self._detectors))

    @staticmethod
    def read(outputs: Sequence[tuple[Tensor, DiagnosticSums]]) -> dict[str, float]:
        """The sum of all microbatches' losses, as `loss`, and of their diagnostics."""
        if not outputs:
            return {}
        losses, sums = zip(*outputs, strict=True)
        return {"loss": sum(torch.stack(losses).tolist()), **read_sums(sums)}
