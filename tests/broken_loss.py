"""A user's policy losses that fail. One has the usual mistake: a root whose derivative at zero is infinite, so that `where`
gives NaN. Others raise, exit, or send SIGTERM to their own process."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from etr_megatron.objective import LossInputs, LossOutputs, regularized, token_local


@token_local
def root_of_zero(inputs: LossInputs) -> LossOutputs:
    """On the rank `rank` of `objective.options`, the gradient of every first token of a chunk is NaN; all values are finite."""
    surrogate = inputs.logp * inputs.advantage
    if dist.get_rank() == inputs.settings.options["rank"]:
        root = (inputs.logp - inputs.logp.detach()).abs().sqrt()
        surrogate = surrogate + torch.where(torch.arange(len(root)) == 0, root, 0.0)
    return regularized(inputs, surrogate)


def root_of_zero_unmarked(inputs: LossInputs) -> LossOutputs:
    """The same without the mark, so that its gradients are formed in Megatron's backward pass."""
    return root_of_zero(inputs)


def needs_an_option(inputs: LossInputs) -> LossOutputs:
    """Fails in a function that it calls, if the option `margin` is missing."""
    return regularized(inputs, inputs.logp * _margin(inputs.settings.options))


def _margin(options: Mapping[str, float]) -> float:
    return options["margin"]


def leaves(inputs: LossInputs) -> LossOutputs:
    """Exits with code 0."""
    sys.exit(0)


_calls = itertools.count(1)


@token_local
def told_to_stop(inputs: LossInputs) -> LossOutputs:
    """The plain policy gradient. From the `call`-th call on, if the file STOP_FLAG exists, removes it and sends SIGTERM to
    rank 0."""
    flag = Path(os.environ["STOP_FLAG"])
    if dist.get_rank() == 0 and next(_calls) >= inputs.settings.options["call"] and flag.exists():
        flag.unlink()
        os.kill(os.getpid(), signal.SIGTERM)
    return regularized(inputs, (inputs.logp - inputs.old_logp).exp() * inputs.advantage)
