"""Whether a loss marked as token-local is token-local: checked by its gradients on halves of the rows."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from etr_megatron.config import LOSSES
from etr_megatron.errors import UserError
from etr_megatron.objective import (
    LossInputs,
    LossOutputs,
    LossSettings,
    PolicyLoss,
    check_row_independence,
    regularized,
    resolve_loss,
)
from etr_megatron.objective.registry import LossFunction
from tests.loss_cases import random_case
from tests.test_own_losses import compares_with_the_mean, squared, takes_a_mean

LOCAL = [loss for loss in map(resolve_loss, LOSSES) if loss.token_local]


def marked(function: LossFunction) -> PolicyLoss:
    return PolicyLoss(f"mine:{function.__name__}", function, token_local=True)


def looks_at_its_neighbour(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp * inputs.entropy.roll(1).detach())


def looks_at_neighbours_that_stand_out(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp * (1.0 + (inputs.advantage > 1.2).sum()))


@pytest.mark.parametrize("function", [takes_a_mean, looks_at_its_neighbour, looks_at_neighbours_that_stand_out])
def test_a_loss_marked_token_local_that_is_not_is_refused(function) -> None:
    case, logp, entropy = random_case(1)
    inputs = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    with pytest.raises(UserError, match=f"loss mine:{function.__name__} is marked token-local, but a row's gradient"):
        check_row_independence(marked(function), inputs)


def takes_a_mean_over_wrong_answers(inputs: LossInputs) -> LossOutputs:
    wrong = (inputs.advantage < 0).float()
    return LossOutputs((inputs.logp * wrong).sum() / wrong.sum().clamp(min=1))


@pytest.mark.parametrize("function", [takes_a_mean, takes_a_mean_over_wrong_answers, compares_with_the_mean])
def test_rows_without_an_advantage_tell_as_well_whether_a_loss_is_token_local(function) -> None:
    case, logp, entropy = random_case(1)
    case.rows["advantage"] = np.zeros_like(logp)
    inputs, state = case.inputs(torch.tensor(logp), torch.tensor(entropy)), torch.get_rng_state()
    with torch.no_grad(), pytest.raises(UserError, match="is marked token-local, but a row's gradient"):
        check_row_independence(marked(function), inputs)
    assert check_row_independence(resolve_loss("clipped"), inputs)
    assert torch.equal(torch.get_rng_state(), state)


def grows_along_its_rows(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp * (1 + inputs.settings.options["by"] * torch.arange(len(inputs.logp))))


@pytest.mark.parametrize(("by", "refused"), [(1e-3, True), (-1e-3, True), (1e-5, False)])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_rows_interact_where_a_gradient_differs_by_more_than_rounding_whatever_its_size(by, refused, scale) -> None:
    case, logp, entropy = random_case(1, LossSettings(options={"by": by}))
    case.rows["weight"] *= scale
    with pytest.raises(UserError, match="is marked token-local, but") if refused else nullcontext():
        assert check_row_independence(marked(grows_along_its_rows), case.inputs(torch.tensor(logp), torch.tensor(entropy)))


def infinite_at_zero(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, (inputs.logp - inputs.logp.detach()).sqrt())


def test_rows_with_a_gradient_that_is_not_finite_cannot_tell() -> None:
    case, logp, entropy = random_case(1)
    inputs = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    assert not check_row_independence(marked(infinite_at_zero), inputs)


def test_rows_without_any_gradient_cannot_tell() -> None:
    case, logp, entropy = random_case(1)
    case.rows["weight"] = np.zeros_like(logp)
    inputs = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    assert not check_row_independence(resolve_loss("clipped"), inputs)


def looks_at_its_entropy(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp * inputs.entropy.sqrt())


@pytest.mark.parametrize("loss", [*LOCAL, marked(squared), marked(looks_at_its_entropy)], ids=lambda loss: loss.name)
def test_a_token_local_loss_passes_for_one(loss: PolicyLoss) -> None:
    for seed in range(5):
        case, logp, entropy = random_case(seed)
        assert check_row_independence(loss, case.inputs(torch.tensor(logp), torch.tensor(entropy)))
