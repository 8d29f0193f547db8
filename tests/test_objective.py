"""Group statistics, bounds, corrections and shaping against independent float64 NumPy references, from the definitions."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etr_megatron.config import PRESETS
from etr_megatron.objective import (
    ElasticBounds,
    GroupStatistics,
    control_radii,
    group_statistics,
    overlong_punishment,
    pass_rate_bins,
    rollout_correction,
    token_weights,
)


def numpy_statistics(rewards: np.ndarray, ids: list[str], preset: dict) -> tuple[np.ndarray, np.ndarray]:
    advantage, variance = np.zeros(len(rewards)), np.zeros(len(rewards))
    for name in set(ids):
        at = [i for i, other in enumerate(ids) if other == name]
        group = rewards[at]
        sigma = group.std()
        for i in at:
            baseline = group.mean()
            if preset["baseline"] == "leave_one_out":
                baseline = (group.sum() - rewards[i]) / (len(at) - 1) if len(at) > 1 else rewards[i]
            advantage[i] = (rewards[i] - baseline) / ((sigma + 1e-6) if preset["normalize"] else 1.0)
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


def elastic_bounds(**values) -> ElasticBounds:
    """From the values of a preset that concern the bounds."""
    return ElasticBounds(**{field.name: values[field.name] for field in fields(ElasticBounds)})


def random_case(seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    ids = [f"g{i}" for i in range(5) for _ in range(int(rng.integers(1, 9)))]
    rng.shuffle(ids)
    return rng.integers(0, 2, len(ids)).astype(float), ids


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", range(5))
def test_statistics_and_bounds_equal_the_numpy_reference(preset, seed):
    values = PRESETS[preset]
    rewards, ids = random_case(seed)
    wanted_advantage, wanted_variance = numpy_statistics(rewards, ids, values)
    statistics = group_statistics(rewards.tolist(), ids, baseline=values["baseline"], normalize=values["normalize"])
    np.testing.assert_allclose(statistics.advantage.numpy(), wanted_advantage, atol=1e-12)
    np.testing.assert_allclose(statistics.variance.numpy(), wanted_variance, atol=1e-12)
    pass_rate = [np.mean([r for r, name in zip(rewards, ids, strict=True) if name == own]) for own in ids]
    np.testing.assert_allclose(statistics.pass_rate.numpy(), pass_rate, atol=1e-12)

    low, high = elastic_bounds(**values)(statistics.advantage, statistics.variance)
    wanted_low, wanted_high = numpy_bounds(wanted_advantage, wanted_variance, values)
    np.testing.assert_allclose(low.numpy(), wanted_low, atol=1e-12)
    np.testing.assert_allclose(high.numpy(), wanted_high, atol=1e-12)


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


def test_each_radius_is_kept_between_the_least_and_the_greatest():
    """At 0.2 and 0.3 times |A|, both radii leave the range at either end, for different samples."""
    bounds = ElasticBounds("linear", "none", 0.0, 0.0, 0.2, 0.3, 0.12, 0.5)
    low, high = bounds(torch.tensor([-0.3, 0.5, -2.0, 2.7], dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    assert low.tolist() == pytest.approx([0.12, 0.12, 0.4, 0.5]) and high.tolist() == pytest.approx([0.12, 0.15, 0.5, 0.5])


def test_etr_without_elasticity_is_grpo_bit_for_bit():
    rewards, ids = random_case(3)
    statistics = group_statistics(rewards.tolist(), ids)
    flat = elastic_bounds(**{**PRESETS["etr"], "alpha": 0.0, "gamma": 0.0})
    grpo = elastic_bounds(**PRESETS["grpo"])
    for a, b in zip(
        flat(statistics.advantage, statistics.variance), grpo(statistics.advantage, statistics.variance), strict=True
    ):
        assert torch.equal(a, b)


def test_no_gradient_goes_through_the_radii():
    advantage, variance = torch.tensor([1.5, -0.5], requires_grad=True), torch.tensor([0.3, 0.3], requires_grad=True)
    assert not any(radii.requires_grad for radii in elastic_bounds(**PRESETS["etr"])(advantage, variance))


def test_dapo_raises_the_upper_bound_alone():
    low, high = elastic_bounds(**PRESETS["dapo"])(torch.tensor([1.5, -0.5]), torch.tensor([0.3, 0.3]))
    assert low.tolist() == [pytest.approx(0.2)] * 2 and high.tolist() == [pytest.approx(0.28)] * 2


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rewards", [[1.0], [0.0], [1.0] * 7, [0.0] * 7, [0.1] * 3, [0.3] * 11])
def test_groups_without_variance_give_zero_advantage_and_no_nan(rewards, baseline, normalize):
    statistics = group_statistics(rewards, ["g"] * len(rewards), baseline=baseline, normalize=normalize)
    assert statistics.advantage.tolist() == [0.0] * len(rewards)
    low, high = elastic_bounds(**PRESETS["etr_second_order"])(statistics.advantage, statistics.variance)
    assert torch.isfinite(low).all() and torch.isfinite(high).all()


def test_variance_comes_from_the_verifier_and_advantage_from_the_shaped_reward():
    shaped, verified = [1.0, 0.5, -0.5, 0.0], [1.0, 1.0, 0.0, 0.0]
    statistics = group_statistics(shaped, ["g"] * 4, verifier_rewards=verified)
    assert statistics.variance.tolist() == [pytest.approx(1.0)] * 4
    assert statistics.pass_rate.tolist() == [0.5] * 4
    wanted = (np.array(shaped) - np.mean(shaped)) / (np.std(shaped) + 1e-6)
    np.testing.assert_allclose(statistics.advantage.numpy(), wanted)


def test_uneven_groups_are_normalised_within_themselves():
    alone = group_statistics([1.0, 0.0, 0.0], ["a"] * 3).advantage
    mixed = group_statistics([1.0, 9.0, 0.0, 0.0, 8.0], ["a", "b", "a", "a", "b"], reward_range=(0, 10)).advantage
    assert torch.equal(mixed[[0, 2, 3]], alone)


def test_reward_outside_of_the_declared_range_is_refused_by_name():
    with pytest.raises(ValueError, match=r"2\.0 of sample 1 in group 'b'.*reward\.range"):
        group_statistics([0.0, 2.0], ["a", "b"])
    with pytest.raises(ValueError, match=r"-0\.5 of sample 0 in group 'a'.*reward\.range"):
        group_statistics([-0.5, 1.0], ["a", "b"])
    with pytest.raises(ValueError, match="known: group_mean, leave_one_out"):
        group_statistics([0.0, 1.0], ["a", "a"], baseline="median")


def test_of_a_reward_that_is_not_finite_the_sample_is_named_and_whether_shaping_made_it():
    with pytest.raises(ValueError, match=r"^reward of sample 0 in group 'a' is nan"):
        group_statistics([math.nan, 1.0], ["a", "b"])
    with pytest.raises(ValueError, match=r"^reward of sample 1 in group 'b' is inf"):
        group_statistics([0.5, math.inf], ["a", "b"], verifier_rewards=[0.5, 1.0])
    with pytest.raises(ValueError, match=r"^verifier reward of sample 1 in group 'b' is nan"):
        group_statistics([0.5, 1.0], ["a", "b"], verifier_rewards=[0.5, math.nan])


@pytest.mark.parametrize(("rewards", "ids", "verified"), [(2, 3, 2), (3, 2, 2), (2, 2, 3)])
def test_as_many_rewards_group_ids_and_verifier_rewards_are_wanted(rewards, ids, verified):
    with pytest.raises(ValueError, match=f"{rewards} rewards, {ids} group ids and {verified} verifier rewards"):
        group_statistics([0.5] * rewards, ["g"] * ids, verifier_rewards=[0.5] * verified)


@settings(max_examples=60, deadline=None)
@given(
    rewards=st.lists(st.floats(0, 1), min_size=1, max_size=24),
    groups=st.integers(1, 5),
    preset=st.sampled_from(sorted(PRESETS)),
    seed=st.integers(0, 1000),
)
def test_bounds_stay_in_range_and_nothing_depends_on_sample_order(rewards, groups, preset, seed):
    values = PRESETS[preset]

    def of(order: list[int]) -> tuple[GroupStatistics, list[torch.Tensor]]:
        statistics = group_statistics(
            [rewards[i] for i in order],
            [f"g{i % groups}" for i in order],
            verifier_rewards=[1 - rewards[i] ** 2 for i in order],  # so that their variance differs from that of the rewards
            baseline=values["baseline"],
            normalize=values["normalize"],
        )
        return statistics, list(elastic_bounds(**values)(statistics.advantage, statistics.variance))

    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed)).tolist()
    statistics, radii = of(list(range(len(rewards))))
    assert torch.isfinite(statistics.advantage).all()
    for radius in radii:
        assert (radius >= values["eps_min"]).all() and (radius <= values["eps_max"]).all()
    shuffled, shuffled_radii = of(order)
    for field in fields(GroupStatistics):
        # Rewards are rounded to 1e-16; delta limits how much the advantage amplifies that, to a million times.
        close = dict(atol=1e-6 if field.name == "advantage" else 1e-12, rtol=1e-9)
        torch.testing.assert_close(getattr(shuffled, field.name), getattr(statistics, field.name)[order], **close)
    for found, radius in zip(shuffled_radii, radii, strict=True):
        torch.testing.assert_close(found, radius[order], atol=1e-6, rtol=1e-9)
    bins, shuffled_bins = (pass_rate_bins(one.pass_rate, one.variance) for one in (statistics, shuffled))
    assert torch.equal(shuffled_bins, bins[order])


@pytest.mark.parametrize("seed", range(5))
def test_the_shuffled_control_keeps_a_samples_two_radii_together(seed):
    advantage = torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5, 2.0])
    low, high = 0.01 * torch.arange(1, 7), 0.28 - 0.03 * torch.arange(1, 7)  # no two radii on a side are equal
    options = dict(how="shuffled", advantage=advantage, tokens=[1] * 6, seed=seed)
    dealt_low, dealt_high = control_radii(low, high, **options)
    pairs = set(zip(low.tolist(), high.tolist(), strict=True))
    assert set(zip(dealt_low.tolist(), dealt_high.tolist(), strict=True)) == pairs
    assert not torch.equal(dealt_low, low)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=2, max_size=24),
    groups=st.integers(1, 4),
    preset=st.sampled_from(["etr_matched", "etr_shuffled", "etr_inverted_macro"]),
    seed=st.integers(0, 1000),
)
def test_controls_do_not_depend_on_sample_order(samples, groups, preset, seed):
    """samples: (reward, tokens) of each. Rewards are in eighths, whose sums are exact in any order."""
    values = PRESETS[preset]

    def of(order: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        statistics = group_statistics([samples[i][0] / 8 for i in order], [f"g{i % groups}" for i in order])
        low, high = elastic_bounds(**{**values, "eps_high": 0.28})(statistics.advantage, statistics.variance)
        control = dict(how=values["control"], advantage=statistics.advantage, tokens=[samples[i][1] for i in order], seed=seed)
        return statistics.advantage, *control_radii(low, high, **control)

    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    advantage, *radii = of(list(range(len(samples))))
    _, *shuffled = of(order)
    for found, radius in zip(shuffled, radii, strict=True):
        wanted = radius[order]
        if preset == "etr_shuffled":  # dealt by position: the same set of radii, and no change for inactive samples
            active = advantage[order] != 0
            found, wanted = (torch.cat([one[~active], one[active].sort().values]) for one in (found, wanted))
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)


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
    assert all(map(math.isfinite, token_weights([0, 0], how, constant_length=7)))  # no tokens to train on


def test_an_aggregation_that_cannot_be_had_is_refused():
    for constant in (None, 0):
        with pytest.raises(ValueError, match=r"constant_length needs objective\.constant_length"):
            token_weights([3, 1], "constant_length", constant)
    with pytest.raises(ValueError, match="known: token_mean, sequence_mean, constant_length"):
        token_weights([3, 1], "mean")


CORRECTIONS = {  # (how, level): weight of a token from its log ratio and its response's sum of log ratios, in NumPy
    ("truncate", "token"): lambda x, total: np.minimum(np.exp(x), 1.7),
    ("truncate", "sequence"): lambda x, total: np.full_like(x, min(np.exp(total), 1.7)),
    ("mask", "token"): lambda x, total: np.where((np.exp(x) >= 0.6) & (np.exp(x) <= 1.7), np.exp(x), 0.0),
    ("mask", "sequence"): lambda x, total: np.full_like(x, np.exp(total) if 0.6 <= np.exp(total) <= 1.7 else 0.0),
}


@pytest.mark.parametrize(("how", "level"), CORRECTIONS)
def test_corrections_equal_the_numpy_reference(how, level):
    rng = np.random.default_rng(1)
    rollout = [rng.normal(-2, 1, n) for n in (5, 1, 9, 0, 3)]
    old = [x + rng.normal(0, 0.4, len(x)) for x in rollout]
    found = rollout_correction(
        [torch.tensor(x) for x in old], [torch.tensor(x) for x in rollout], how=how, level=level, cap=1.7, floor=0.6
    )
    wanted = [CORRECTIONS[how, level](o - r, (o - r).sum()) for o, r in zip(old, rollout, strict=True)]
    for weights, expected in zip(found, wanted, strict=True):
        assert weights.dtype == torch.float32
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    everything = np.concatenate(wanted)
    if how == "mask":
        assert 0 < (everything == 0).sum() < len(everything)
    else:
        assert 0 < (everything == 1.7).sum() < len(everything)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_where_engine_and_trainer_agree_no_correction_masks_at_a_cap_and_a_floor_of_1(level):
    logp = [torch.tensor([-0.25, -2.0, -1.0])]
    weights = rollout_correction(logp, logp, how="mask", level=level, cap=1.0, floor=1.0)[0]
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_corrections_off_far_off_and_misspelt():
    old, rollout = [torch.tensor([0.0, -500.0])], [torch.tensor([-500.0, 0.0])]
    options = dict(level="token", cap=2.0, floor=0.5)
    assert rollout_correction(old, rollout, how="none", **options) is None
    assert rollout_correction(old, rollout, how="truncate", **options)[0].tolist() == pytest.approx([2.0, math.exp(-20)])
    assert rollout_correction(old, rollout, how="mask", **options)[0].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="known: none, truncate, mask"):
        rollout_correction(old, rollout, how="tis", **options)
    with pytest.raises(ValueError, match="known: token, sequence"):
        rollout_correction(old, rollout, how="mask", level="batch", cap=2.0, floor=0.5)


def test_overlong_punishment_is_dapos_formula():
    longest, buffer = 20, 6
    for length in range(0, 25):
        if length <= longest - buffer:
            wanted = 0.0
        elif length <= longest:
            wanted = ((longest - buffer) - length) / buffer
        else:
            wanted = -1.0
        assert overlong_punishment(length, max_length=longest, buffer=buffer) == pytest.approx(wanted)
    assert overlong_punishment(20, max_length=20, buffer=0) == 0.0
    assert overlong_punishment(20, max_length=20, buffer=20) == -1.0


def test_pass_rate_bins_are_half_open_and_leave_out_groups_without_variance():
    rewards = {"none": [0, 0, 0], "fifth": [1, 0, 0, 0, 0], "quarter": [0, 0, 1, 0], "half": [1, 0], "most": [1, 1, 1, 0]}
    rewards |= {"all": [1, 1], "equal": [0.5, 0.5]}
    ids = [name for name, values in rewards.items() for _ in values]
    statistics = group_statistics([float(r) for values in rewards.values() for r in values], ids)
    bins = pass_rate_bins(statistics.pass_rate, statistics.variance).tolist()
    found = {name: bins[ids.index(name)] for name in rewards}
    assert found == {"none": -1, "fifth": 0, "quarter": 1, "half": 2, "most": 3, "all": -1, "equal": -1}


def test_a_pass_rate_that_rounds_to_all_is_in_the_last_bin_while_its_group_has_variance():
    statistics = group_statistics([1.0, 1.0, 1.0 - 1e-9], ["g"] * 3)
    assert pass_rate_bins(statistics.pass_rate, statistics.variance).tolist() == [3] * 3


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.1, 1.0), (-1.0, 0.9), (0.0, 0.3)])
@pytest.mark.parametrize("size", [4, 12, 32, 64])
def test_a_pass_rate_on_the_edge_of_a_bin_belongs_to_the_upper_one_in_any_range_of_rewards(low, high, size):
    for quarters in (1, 2, 3):
        right = quarters * size // 4
        rewards = [high] * right + [low] * (size - right)
        statistics = group_statistics(rewards, ["g"] * size, reward_range=(low, high))
        assert pass_rate_bins(statistics.pass_rate, statistics.variance).tolist() == [quarters] * size
