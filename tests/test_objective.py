"""ETR's statistics, bounds and loss against an independent float64 NumPy reference, written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etr_megatron.config import PRESETS
from etr_megatron.objective import (
    ElasticBounds,
    LossInputs,
    clipped_loss,
    get_loss,
    group_statistics,
    kl_estimate,
    register_loss,
    token_weights,
)


def numpy_statistics(rewards: np.ndarray, ids: list[str], delta: float) -> tuple[np.ndarray, np.ndarray]:
    advantage, variance = np.zeros(len(rewards)), np.zeros(len(rewards))
    for name in set(ids):
        at = [i for i, other in enumerate(ids) if other == name]
        mu, sigma = rewards[at].mean(), rewards[at].std()
        advantage[at] = (rewards[at] - mu) / (sigma + delta)
        variance[at] = 4 * sigma**2
    return advantage, variance


def numpy_bounds(advantage: np.ndarray, variance: np.ndarray, preset: dict) -> tuple[np.ndarray, np.ndarray]:
    micro = {
        "tanh": 1 + preset["alpha"] * np.tanh(np.abs(advantage) - 1),
        "linear": np.abs(advantage),
        "none": np.ones_like(advantage),
    }[preset["micro"]]
    macro = {
        "variance": 1 - preset["gamma"] + preset["gamma"] * variance,
        "inverse_variance": 1 - preset["gamma"] * variance,
        "std": np.sqrt(variance),
        "none": np.ones_like(variance),
    }[preset["macro"]]
    radii = (np.clip(preset[key] * micro * macro, preset["eps_min"], preset["eps_max"]) for key in ("eps_low", "eps_high"))
    return tuple(radii)


def numpy_loss(logp, old, advantage, low, high, weight) -> tuple[float, np.ndarray]:
    """Loss and its gradient with respect to logp."""
    ratio = np.exp(logp - old)
    clipped = np.clip(ratio, 1 - low, 1 + high)
    active = ratio * advantage <= clipped * advantage
    loss = -(weight * np.minimum(ratio * advantage, clipped * advantage)).sum()
    return loss, np.where(active, -weight * ratio * advantage, 0.0)


def elastic_bounds(control: str = "none", **values) -> ElasticBounds:
    return ElasticBounds(**values)


def random_case(seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    ids = [f"g{i}" for i in range(5) for _ in range(int(rng.integers(1, 9)))]
    rng.shuffle(ids)
    return rng.integers(0, 2, len(ids)).astype(float), ids


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", range(5))
def test_statistics_bounds_and_loss_equal_the_numpy_reference(preset, seed):
    values = PRESETS[preset]
    rewards, ids = random_case(seed)
    wanted_advantage, wanted_variance = numpy_statistics(rewards, ids, 1e-6)
    statistics = group_statistics(rewards.tolist(), ids)
    np.testing.assert_allclose(statistics.advantage.numpy(), wanted_advantage, atol=1e-12)
    np.testing.assert_allclose(statistics.variance.numpy(), wanted_variance, atol=1e-12)

    low, high = elastic_bounds(**values)(statistics.advantage, statistics.variance)
    wanted_low, wanted_high = numpy_bounds(wanted_advantage, wanted_variance, values)
    np.testing.assert_allclose(low.numpy(), wanted_low, atol=1e-12)
    np.testing.assert_allclose(high.numpy(), wanted_high, atol=1e-12)

    rng = np.random.default_rng(seed + 100)
    old = rng.normal(-2, 1, len(ids))
    logp = torch.tensor(old + rng.normal(0, 0.4, len(ids)), requires_grad=True)
    weight = rng.random(len(ids))
    tensors = [torch.tensor(x) for x in (old, old, wanted_advantage, wanted_low, wanted_high, weight)]
    outputs = clipped_loss(LossInputs(logp, torch.zeros_like(logp), *tensors))
    outputs.loss.backward()
    wanted_loss, wanted_gradient = numpy_loss(logp.detach().numpy(), old, wanted_advantage, wanted_low, wanted_high, weight)
    assert outputs.loss.item() == pytest.approx(wanted_loss, abs=1e-12)
    np.testing.assert_allclose(logp.grad.numpy(), wanted_gradient, atol=1e-12)


TABLE = {  # (k, G): eps for a correct / a wrong response by form, from the definitions at eps0 = 0.2 without clamps
    (1, 16): {"linear": (0.775, 0.052), "tanh": (0.299, 0.137), "etr": (0.185, 0.085), "second": (0.375, 0.025)},
    (1, 8): {"linear": (0.529, 0.076), "tanh": (0.293, 0.145), "etr": (0.210, 0.104), "second": (0.350, 0.050)},
    (1, 4): {"linear": (0.346, 0.115), "tanh": (0.262, 0.160), "etr": (0.230, 0.140), "second": (0.300, 0.100)},
    (1, 2): {"linear": (0.200, 0.200), "tanh": (0.200, 0.200), "etr": (0.200, 0.200), "second": (0.200, 0.200)},
}
FORMS = {
    "linear": ("linear", "none"),
    "tanh": ("tanh", "none"),
    "etr": ("tanh", "variance"),
    "second": ("linear", "std"),
}


@pytest.mark.parametrize(("k", "size"), TABLE)
@pytest.mark.parametrize("form", FORMS)
def test_radii_of_known_pass_rates(k, size, form):
    rewards = [1.0] * k + [0.0] * (size - k)
    statistics = group_statistics(rewards, ["g"] * size, delta=0.0)
    micro, macro = FORMS[form]
    bounds = ElasticBounds(micro, macro, 0.5, 0.5, 0.2, 0.2, 0.0, 10.0)
    _, high = bounds(statistics.advantage, statistics.variance)
    wanted = TABLE[k, size][form]
    assert (high[0].item(), high[-1].item()) == pytest.approx(wanted, abs=6e-4)


def test_etr_without_elasticity_is_grpo_bit_for_bit():
    rewards, ids = random_case(3)
    statistics = group_statistics(rewards.tolist(), ids)
    flat = elastic_bounds(**{**PRESETS["etr"], "alpha": 0.0, "gamma": 0.0})
    grpo = elastic_bounds(**PRESETS["grpo"])
    for a, b in zip(
        flat(statistics.advantage, statistics.variance), grpo(statistics.advantage, statistics.variance), strict=True
    ):
        assert torch.equal(a, b)


def test_dapo_raises_the_upper_bound_alone():
    low, high = elastic_bounds(**PRESETS["dapo"])(torch.tensor([1.5, -0.5]), torch.tensor([0.3, 0.3]))
    assert low.tolist() == [pytest.approx(0.2)] * 2 and high.tolist() == [pytest.approx(0.28)] * 2


@pytest.mark.parametrize("rewards", [[1.0], [0.0], [1.0] * 7, [0.0] * 7, [0.1] * 3, [0.3] * 11])
def test_groups_without_variance_give_zero_advantage_and_no_nan(rewards):
    statistics = group_statistics(rewards, ["g"] * len(rewards))
    assert statistics.advantage.tolist() == [0.0] * len(rewards)
    low, high = elastic_bounds(**PRESETS["etr_second_order"])(statistics.advantage, statistics.variance)
    assert torch.isfinite(low).all() and torch.isfinite(high).all()


def test_variance_comes_from_the_verifier_and_advantage_from_the_shaped_reward():
    shaped, verified = [1.0, 0.5, -0.5, 0.0], [1.0, 1.0, 0.0, 0.0]
    statistics = group_statistics(shaped, ["g"] * 4, verifier_rewards=verified)
    assert statistics.variance.tolist() == [pytest.approx(1.0)] * 4
    wanted = (np.array(shaped) - np.mean(shaped)) / (np.std(shaped) + 1e-6)
    np.testing.assert_allclose(statistics.advantage.numpy(), wanted)


def test_uneven_groups_are_normalised_within_themselves():
    alone = group_statistics([1.0, 0.0, 0.0], ["a"] * 3).advantage
    mixed = group_statistics([1.0, 9.0, 0.0, 0.0, 8.0], ["a", "b", "a", "a", "b"], reward_range=(0, 10)).advantage
    assert torch.equal(mixed[[0, 2, 3]], alone)


def test_reward_outside_of_the_declared_range_is_refused_by_name():
    with pytest.raises(ValueError, match=r"2\.0 of sample 1 in group 'b'.*reward\.range"):
        group_statistics([0.0, 2.0], ["a", "b"])
    with pytest.raises(ValueError, match="sample 0 in group 'a' is nan"):
        group_statistics([math.nan, 1.0], ["a", "b"])


@settings(max_examples=60, deadline=None)
@given(
    rewards=st.lists(st.floats(0, 1), min_size=1, max_size=24),
    groups=st.integers(1, 5),
    preset=st.sampled_from(sorted(PRESETS)),
    seed=st.integers(0, 1000),
)
def test_bounds_stay_in_range_and_nothing_depends_on_sample_order(rewards, groups, preset, seed):
    ids = [f"g{i % groups}" for i in range(len(rewards))]
    values = PRESETS[preset]
    statistics = group_statistics(rewards, ids)
    assert torch.isfinite(statistics.advantage).all()
    low, high = elastic_bounds(**values)(statistics.advantage, statistics.variance)
    for radius in (low, high):
        assert (radius >= values["eps_min"]).all() and (radius <= values["eps_max"]).all() and values["eps_max"] < 1
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = group_statistics([rewards[i] for i in order], [ids[i] for i in order])
    torch.testing.assert_close(shuffled.advantage, statistics.advantage[order], atol=1e-6, rtol=1e-9)


def test_at_ratio_one_no_bound_is_active_and_the_gradient_is_plain_policy_gradient():
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    tight = torch.full_like(advantage, 0.05)
    weight = torch.full_like(advantage, 1 / 3)
    outputs = clipped_loss(LossInputs(logp, logp, logp.detach(), logp.detach(), advantage, tight, tight, weight))
    outputs.loss.backward()
    torch.testing.assert_close(logp.grad, -weight * advantage)
    assert outputs.sums["clip_upper"] == 0 and outputs.sums["clip_lower"] == 0


def test_huge_log_ratios_stay_finite():
    logp = torch.tensor([0.0, -2000.0], requires_grad=True)
    old = torch.tensor([-2000.0, 0.0])
    ones = torch.ones(2)
    outputs = clipped_loss(LossInputs(logp, ones, old, old, ones, 0.2 * ones, 0.2 * ones, ones, ref_logp=old, kl_coef=1.0))
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss) and torch.isfinite(logp.grad).all()


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant_length"])
def test_weights_sum_the_token_losses_as_defined(how):
    lengths, rng = [3, 1, 5], np.random.default_rng(0)
    losses = [rng.normal(size=n) for n in lengths]
    weights = token_weights(lengths, how, constant_length=7)
    found = sum(w * x.sum() for w, x in zip(weights, losses, strict=True))
    wanted = {
        "token_mean": np.concatenate(losses).mean(),
        "sequence_mean": np.mean([x.mean() for x in losses]),
        "constant_length": np.mean([x.sum() / 7 for x in losses]),
    }[how]
    assert found == pytest.approx(wanted)


def test_kl_estimators_by_definition():
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    x = (ref - logp).numpy()
    np.testing.assert_allclose(kl_estimate(logp, ref, "k1").numpy(), -x)
    np.testing.assert_allclose(kl_estimate(logp, ref, "k2").numpy(), x**2 / 2)
    np.testing.assert_allclose(kl_estimate(logp, ref, "k3").numpy(), np.exp(x) - 1 - x)


def test_a_loss_of_ones_own_is_found_by_name_and_names_are_unique():
    @register_loss("test_only")
    def mine(inputs):
        return clipped_loss(inputs)

    assert get_loss("test_only") is mine
    with pytest.raises(ValueError, match="registered already"):
        register_loss("test_only")(mine)
    with pytest.raises(ValueError, match="known: clipped"):
        get_loss("nothing")
