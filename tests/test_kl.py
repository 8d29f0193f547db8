"""The KL to a reference: its estimators by definition, and their gradients in the loss and in the reward."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from etr_megatron.objective import LossSettings, kl_estimate, kl_penalty, resolve_loss
from tests import loss_cases


def test_kl_estimators_by_definition():
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    x = (ref - logp).numpy()
    np.testing.assert_allclose(kl_estimate(logp, ref, "k1").numpy(), -x)
    np.testing.assert_allclose(kl_estimate(logp, ref, "k2").numpy(), x**2 / 2)
    np.testing.assert_allclose(kl_estimate(logp, ref, "k3").numpy(), np.exp(x) - 1 - x)
    far = kl_estimate(torch.tensor([-500.0, 0.0], dtype=torch.float64), torch.tensor([0.0, -500.0], dtype=torch.float64), "k3")
    assert far.tolist() == pytest.approx([math.exp(20) - 1 - 20, math.exp(-20) - 1 + 20])
    with pytest.raises(ValueError, match="kl_estimator is 'k4'; known: k1, k2, k3"):
        kl_estimate(logp, ref, "k4")


def test_mean_gradients_of_the_kl_estimators_are_those_their_docstring_names():
    """The exact expectation over all tokens of a small vocabulary, not a mean of samples."""
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(7, dtype=torch.float64, generator=generator).log_softmax(0)
    logits = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits)[0]

    def mean_of_gradients(kind: str) -> torch.Tensor:
        logp = logits.log_softmax(0)
        return gradient((logp.detach().exp() * kl_estimate(logp, ref, kind)).sum())

    logp = logits.log_softmax(0)
    torch.testing.assert_close(mean_of_gradients("k1"), torch.zeros_like(ref))
    torch.testing.assert_close(mean_of_gradients("k2"), gradient((logp.exp() * (logp - ref)).sum()))
    logp = logits.log_softmax(0)
    torch.testing.assert_close(mean_of_gradients("k3"), gradient((ref.exp() * (ref - logp)).sum()))


def test_of_constants_in_the_reward_only_k1_has_the_gradient_of_the_kl():
    """Exact expectations as above; the policy gradient of a reward is E[reward grad log pi]."""
    generator = torch.Generator().manual_seed(0)
    ref_logits, away = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    ref = ref_logits.log_softmax(0)

    def gradients(distance: float) -> dict[str, torch.Tensor]:
        logits = (ref_logits + distance * away).requires_grad_()
        logp = logits.log_softmax(0)
        p = logp.detach().exp()
        values = {kind: (p * kl_estimate(logp, ref, kind).detach() * logp).sum() for kind in ("k1", "k2", "k3")}
        values["kl"] = (logp.exp() * (logp - ref)).sum()
        values["kl_from_ref"] = (ref.exp() * (ref - logp)).sum()
        return {name: torch.autograd.grad(value, logits, retain_graph=True)[0] for name, value in values.items()}

    far, near = gradients(1.0), gradients(0.01)
    torch.testing.assert_close(far["k1"], far["kl"])
    torch.testing.assert_close(far["k3"], far["kl"] - far["kl_from_ref"])
    for kind in ("k2", "k3"):
        assert (far[kind] - far["kl"]).norm() > 0.2 * far["kl"].norm()
        assert near[kind].norm() < 0.02 * near["kl"].norm()


def test_kl_penalty_sums_k1_over_the_response():
    assert kl_penalty(torch.tensor([-1.0, -2.5]), torch.tensor([-1.25, -2.0])) == pytest.approx(0.25 - 0.5)


def test_a_kl_without_a_reference_is_refused_not_left_out():
    case, logp, entropy = loss_cases.random_case(0, LossSettings(kl_coef=0.3))
    inputs = replace(case.inputs(torch.tensor(logp), torch.tensor(entropy)), ref_logp=None)
    with pytest.raises(ValueError, match=r"kl_coef is 0\.3, but there are no reference log-probs"):
        resolve_loss("clipped")(inputs)
