"""Jobs that gang ranks run for the tests of low-rank adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from etr_megatron import checkpoint
from etr_megatron.errors import UserError
from etr_megatron.platform.phases import PhaseBarriers
from etr_megatron.policy import Policy
from tests.late_writes import held_back
from tests.policy_jobs import build, make_batch


def step(model: str, sequences: list, old_logp: list, overrides: list[str], factors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """An update that starts from these factors: Adam's step on each of this rank's, and all weights before it, after it and
    without adapters."""
    policy = build(model, overrides)
    own = policy.adapters.named()
    with torch.no_grad():
        for name, factor in own.items():
            factor.copy_(factors[name])
    policy.optimizer.reload_model_params()
    policy.adapters.merge()
    merged = {name: tensor.clone() for name, tensor in policy.export()}
    with policy.adapters.disabled():
        base = {name: tensor.clone() for name, tensor in policy.export()}
    restored = {name: tensor.clone() for name, tensor in policy.export()}
    policy.update(replace(make_batch(sequences), old_logp=tuple(old_logp)))
    held = [name for chunk in policy.chunks for name, one in chunk.named_parameters() if hasattr(one, "main_grad")]
    return {
        "steps": {name: factors[name] - factor.detach() for name, factor in own.items()},
        "merged": merged,
        "base": base,
        "restored": restored,
        "updated": {name: tensor.clone() for name, tensor in policy.export()},
        "with_buffers": held,
        "with_gradients": [name for chunk in policy.chunks for name, one in chunk.named_parameters() if one.grad is not None],
    }


def initial(model: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    """This rank's factors before training."""
    return {name: factor.detach() for name, factor in build(model, overrides).adapters.named().items()}


def refusal(model: str, overrides: list[str]) -> str:
    """The error of building the policy."""
    try:
        build(model, overrides)
    except UserError as error:
        return str(error)
    return "none"


def resumed_scales(model: str, folder: str, recipes: tuple[str, str]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """By layer, the state of Transformer Engine that layers which pass for its have when a checkpoint of adapters is written
    with the first FP8 recipe, and that they are given when it is loaded with the second."""
    from megatron.core.tensor_parallel import RowParallelLinear  # only after etr_megatron.policy has prepared it

    given: dict[str, list[int]] = {}
    scales: dict[RowParallelLinear, torch.Tensor] = {}

    def built(recipe: str) -> tuple[Policy, dict[RowParallelLinear, str]]:
        policy = build(model, ["parallel.tp=1", "lora.rank=2", "checkpoint.asynchronous=true"])
        policy.config = replace(policy.config, fp8=replace(policy.config.fp8, recipe=recipe))
        return policy, {one: name for name, one in policy.chunks[0].named_modules() if isinstance(one, RowParallelLinear)}

    def own(layer: RowParallelLinear) -> torch.Tensor:
        return scales.setdefault(layer, torch.tensor(layer.weight.shape))

    def take(layer: RowParallelLinear, state: torch.Tensor | None) -> None:
        if state is not None:  # Megatron's own layers are given None where a checkpoint has nothing
            given[again[layer]] = state.tolist()

    (before, layers), (after, again) = map(built, recipes)
    with mock.patch.multiple(RowParallelLinear, get_extra_state=own, set_extra_state=take):
        saver = checkpoint.Saver(before.config, PhaseBarriers(60))
        with held_back():
            saver.save(Path(folder), 0, before, {}, ())
            had = {name: own(layer).tolist() for layer, name in layers.items()}
            for scale in scales.values():  # as in an update while the checkpoint is being written
                scale.zero_()
        saver.finish()
        checkpoint.load(Path(folder), 0, after)
    return had, given


def refused_checkpoint(model: str, folder: str, before: list[str], after: list[str], other_model: str = "") -> str:
    """The error of loading a checkpoint into a policy of another config, or of another model."""
    checkpoint.save(Path(folder), 0, build(model, before), {}, keep=1)
    try:
        checkpoint.load(Path(folder), 0, build(other_model or model, after))
    except UserError as error:
        return str(error)
    return "none"
