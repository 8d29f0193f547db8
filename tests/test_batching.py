"""Batching before any split: per-group advantages and ranges, minibatches of whole groups, and denominators."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import replace

import numpy as np
import pytest
import torch

from etr_megatron.batching import build_batch, minibatches
from etr_megatron.errors import UserError
from etr_megatron.metrics import step_metrics
from etr_megatron.objective import LossSettings, resolve_loss
from etr_megatron.policy import StepRouting, TokenLogprobs
from etr_megatron.policy.loss_inputs import loss_inputs, loss_settings, pass_rate_bins_of_samples
from etr_megatron.policy.non_finite import NonFiniteDetector, check_finite
from etr_megatron.policy.packing import pack
from tests.batches import FLAT_LENGTHS, LENGTHS, REWARDS, batch_of, config, groups, logprobs, metrics_row, update

SIZES = [len(lengths) for lengths in LENGTHS]


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant_length"])
def test_minibatches_are_whole_groups_with_their_own_denominator(how):
    settings = config(f"objective.aggregation={how}", "objective.constant_length=10")
    batch = build_batch(groups(), settings, 1, old=logprobs(), reference=None)
    parts = minibatches(batch, groups(), settings)
    assert [part.names for part in parts] == [batch.names[:5], batch.names[5:]]
    for part, lengths in zip(
        parts, (functools.reduce(operator.iadd, LENGTHS[:2], []), functools.reduce(operator.iadd, LENGTHS[2:], [])), strict=True
    ):
        weighted = [w * n for w, n in zip(part.weight.tolist(), lengths, strict=True)]
        wanted = {
            "token_mean": 1.0,
            "sequence_mean": 1.0,
            "constant_length": sum(lengths) / (10 * len(lengths)),
        }[how]
        assert sum(weighted) == pytest.approx(wanted)


def test_a_minibatch_has_its_own_samples_values_of_everything():
    settings = config("objective.correction=truncate")
    routing = StepRouting(tuple(FLAT_LENGTHS), tuple(torch.full((n, 1, 2), n) for n in FLAT_LENGTHS))
    batch = build_batch(groups(), settings, 1, old=logprobs(seed=1), reference=logprobs(seed=2), routing=routing)
    values = {name: value for name, value in vars(batch).items() if name not in ("weight", "routing")}
    assert all(value is not None and len(value) == 11 for value in values.values())
    for part, samples in zip(minibatches(batch, groups(), settings), (range(5), range(5, 11)), strict=True):
        for name, value in values.items():
            assert list(getattr(part, name)) == [value[i] for i in samples], name
        assert list(part.routing.lengths) == [FLAT_LENGTHS[i] for i in samples] == [one[0, 0, 0] for one in part.routing.chosen]


def test_advantages_and_ranges_come_from_each_samples_own_group():
    batch = batch_of()
    assert batch.advantage[:2].tolist() == pytest.approx([1.0, -1.0], abs=1e-4)
    assert batch.advantage[2:5].tolist() == pytest.approx([0.7071, 0.7071, -1.4142], abs=1e-3)
    assert batch.advantage[5:7].tolist() == [0.0, 0.0]
    assert batch.advantage[7:].tolist() == pytest.approx([1.7320, -0.5774, -0.5774, -0.5774], abs=1e-3)
    for number, (of_group, rewards) in enumerate(zip(batch.group_mean.split(SIZES), REWARDS, strict=True)):
        assert of_group.tolist() == pytest.approx([np.mean(rewards)] * len(rewards))
        assert batch.group_std.split(SIZES)[number].tolist() == pytest.approx([np.std(rewards)] * len(rewards))
        assert batch.variance.split(SIZES)[number].tolist() == pytest.approx([4 * np.var(rewards)] * len(rewards))
    # The etr preset with k of G = 1/4: radius 0.230 for the correct response, 0.140 for a wrong one.
    assert batch.clip_high[7].item() == pytest.approx(0.230, abs=1e-3)
    assert batch.clip_high[8].item() == pytest.approx(0.140, abs=1e-3)


def test_a_problem_that_two_of_a_steps_groups_ask_is_compared_within_each_of_them():
    """As at an epoch boundary, where two steps request the same problem and both groups end up in one of them."""
    twice = [*groups()[:2], *(replace(group, id=f"{group.problem.id}@4") for group in groups()[:2])]
    for group, rewards in zip(twice[2:], [(0.0, 0.0), (1.0, 0.0, 0.0)], strict=True):
        for sample, reward in zip(group.samples, rewards, strict=True):
            sample.reward = reward
    old = TokenLogprobs(*(torch.ones(30).split([3, 1, 2, 5, 4] * 2) for _ in range(2)))
    batch = build_batch(twice, config("objective.preset=dr_grpo"), 4, old=old, reference=None)
    wanted = [0.5, -0.5, 1 / 3, 1 / 3, -2 / 3, 0, 0, 2 / 3, -1 / 3, -1 / 3]
    assert batch.advantage.tolist() == pytest.approx(wanted, abs=1e-6)
    assert batch.names == tuple(f"p{p}@{step}/{i}" for step in (3, 4) for p, n in ((0, 2), (1, 3)) for i in range(n))


def test_variance_pass_rate_and_accuracy_are_taken_in_the_declared_range_of_rewards():
    plain, ends = batch_of(), ["reward.range_min=-1", "reward.range_max=3"]
    batch = batch_of(*ends, reward_range=(-1.0, 3.0))
    torch.testing.assert_close(batch.variance, plain.variance)
    assert batch.variance[7].item() == pytest.approx(0.75) and torch.equal(batch.pass_rate_bin, plain.pass_rate_bin)
    torch.testing.assert_close(batch.clip_high, plain.clip_high, atol=1e-6, rtol=0)
    row = step_metrics(3, groups((-1.0, 3.0)), batch, [update(33.0, ratio_squared=33.0)], config(*ends))
    assert row["accuracy"] == pytest.approx(4 / 11) and row["reward_mean"] == pytest.approx(-1 + 4 * 4 / 11)


def test_delta_is_added_to_the_deviation_that_the_advantage_is_divided_by():
    # With 1 of 4 correct, the standard deviation is sqrt(3) / 4.
    assert batch_of("objective.delta=0.5").advantage[7].item() == pytest.approx(0.75 / (math.sqrt(3) / 4 + 0.5))


def test_every_number_of_the_objective_reaches_the_loss():
    given = ["dual_clip=3", "kl_coef=0.3", "kl_estimator=k2", "entropy_coef=0.02", "log_ratio_bound=5", "options={power: 0.5}"]
    own = "objective.loss=tests.test_policy_losses:pull_up"  # only a user's own loss may have options
    found = loss_settings(config(own, *(f"objective.{one}" for one in given)).objective)
    assert found == LossSettings(
        log_ratio_bound=5.0, kl_coef=0.3, kl_estimator="k2", entropy_coef=0.02, dual_clip=3.0, options={"power": 0.5}
    )


def radii(preset: str, step: int = 1, seed: int = 1):
    batch = batch_of(f"objective.preset={preset}", f"run.seed={seed}", step=step)
    return batch.clip_low, batch.advantage != 0


def test_the_matched_control_is_fixed_at_etrs_mean_radius_over_the_tokens_that_learn():
    etr, active = radii("etr")
    matched, _ = radii("etr_matched")
    tokens = torch.tensor(functools.reduce(operator.iadd, LENGTHS, [])).float()
    assert len(set(matched.tolist())) == 1
    assert matched[0].item() == pytest.approx((etr * tokens)[active].sum().item() / tokens[active].sum().item())


def test_the_shuffled_control_deals_out_the_same_radii_to_other_samples():
    etr, active = radii("etr")
    dealt = [radii("etr_shuffled", *of)[0] for of in ((1, 1), (2, 1), (1, 1), (1, 2))]
    for found in dealt:
        assert sorted(found[active].tolist()) == sorted(etr[active].tolist())
        assert torch.equal(found[~active], etr[~active])
    assert not torch.equal(dealt[0], etr) and not torch.equal(dealt[0], dealt[1])
    assert torch.equal(dealt[0], dealt[2])
    assert not torch.equal(dealt[0], dealt[3]) and not torch.equal(dealt[1], dealt[3])  # another seed of the run


def test_the_inverted_control_gives_less_where_the_variance_is_highest():
    etr, _ = radii("etr")
    inverted, _ = radii("etr_inverted_macro")
    # Group 0 has pass rate 1/2 (v = 1), group 3 has 1/4 (v = 3/4).
    assert etr[0].item() == pytest.approx(0.2, abs=1e-5) and inverted[0].item() == pytest.approx(0.1, abs=1e-5)
    assert (inverted[7] / etr[7]).item() == pytest.approx((1 - 0.5 * 0.75) / (1 - 0.5 + 0.5 * 0.75), abs=1e-5)


def test_etr_without_elasticity_is_grpo_bit_for_bit_in_batch_loss_and_gradient():
    flat = ["objective.preset=etr", "objective.alpha=0", "objective.gamma=0"]
    results = []
    for overrides in (flat, ["objective.preset=grpo"]):
        batch, settings = batch_of(*overrides, old=logprobs(seed=1)), config(*overrides)
        micro = pack(batch.sequences, range(len(batch)), multiple=1, device=torch.device("cpu"))
        logp = torch.cat(logprobs(seed=2).logp).requires_grad_()
        inputs = loss_inputs(batch, micro, loss_settings(settings.objective)).at(slice(None), logp, torch.ones_like(logp))
        loss = resolve_loss(settings.objective.loss)(inputs).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        results.append([batch.clip_low, batch.clip_high, batch.advantage, loss, gradient])
    assert results[0][4].abs().max() > 0
    for etr, grpo in zip(*results, strict=True):
        assert torch.equal(etr, grpo)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("dr_grpo", [0.5, -0.5, 1 / 3, 1 / 3, -2 / 3, 0, 0, 0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1, -1, 0.5, 0.5, -1, 0, 0, 1, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_unnormalised_advantages(preset, wanted):
    assert batch_of(f"objective.preset={preset}").advantage.tolist() == pytest.approx(wanted)


def test_the_length_punishment_changes_what_is_trained_on_and_leaves_the_variance_the_verifiers():
    # Responses of 7, 6, 5 and 4 tokens lose 1.0, 0.75, 0.5 and 0.25 of the penalty, shorter ones nothing.
    overrides = ["objective.preset=dr_grpo", "rollout.max_response_tokens=7", "reward.overlong_buffer=4"]
    plain, shaped = batch_of("objective.preset=dr_grpo"), batch_of(*overrides, "reward.overlong_penalty=0.4")
    punished = {3: 0.2, 4: 0.1, 5: 0.3, 10: 0.4}
    flat = [reward - punished.get(i, 0.0) for i, reward in enumerate(functools.reduce(operator.iadd, REWARDS, []))]
    wanted, first = [], 0
    for rewards in REWARDS:
        group = flat[first : first + len(rewards)]
        wanted += [reward - sum(group) / len(group) for reward in group]
        first += len(rewards)
    assert shaped.advantage.tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(shaped.variance, plain.variance) and shaped.advantage[5] != 0
    assert torch.equal(shaped.pass_rate_bin, plain.pass_rate_bin)
    row = metrics_row(shaped, *overrides)
    assert row["reward_mean"] == pytest.approx(4 / 11) and row["reward_shaped_mean"] == pytest.approx(sum(flat) / 11)
    assert "reward_shaped_mean" not in metrics_row(plain)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant_length"])
def test_without_truncated_responses_the_loss_is_that_of_the_others_with_the_advantages_of_all(how):
    """In `groups()`, the first response of each group was cut off."""
    overrides = [f"objective.aggregation={how}", "objective.constant_length=10"]
    masking = config(*overrides, "objective.mask_truncated=true")
    routing = StepRouting(tuple(FLAT_LENGTHS), tuple(torch.full((n, 1, 2), n) for n in FLAT_LENGTHS))
    whole, masked = (build_batch(groups(), c, 1, old=logprobs(), reference=None, routing=routing) for c in (config(), masking))
    for name in ("advantage", "group_mean", "group_std", "variance", "clip_low", "pass_rate_bin"):
        assert torch.equal(getattr(masked, name), getattr(whole, name))
    for part, kept in zip(minibatches(masked, groups(), masking), ([1, 3, 4], [6, 8, 9, 10]), strict=True):
        assert part.names == tuple(whole.names[i] for i in kept)
        assert torch.equal(part.advantage, whole.advantage[kept])
        assert list(part.routing.lengths) == [FLAT_LENGTHS[i] for i in kept]
        lengths = [FLAT_LENGTHS[i] for i in kept]
        per_token = {
            "token_mean": [1 / sum(lengths)] * len(kept),
            "sequence_mean": [1 / (n * len(kept)) for n in lengths],
            "constant_length": [1 / (10 * len(kept))] * len(kept),
        }[how]
        assert part.weight.tolist() == pytest.approx(per_token)
    assert (masked.weight == 0).nonzero()[:, 0].tolist() == [0, 2, 5, 7]


def test_dialogues_that_a_failed_call_ended_are_left_out_of_the_loss_as_truncated_ones_are():
    failed, masking = groups(), config("objective.mask_truncated=true")
    for sample in (sample for group in failed for sample in group.samples):
        sample.environment_status = "ok"
        if sample.finish_reason == "length":
            sample.finish_reason, sample.environment_status = "stop", "timeout"
    wanted = build_batch(groups(), masking, 1, old=logprobs(), reference=None)
    found = build_batch(failed, config(), 1, old=logprobs(), reference=None)
    assert torch.equal(found.weight, wanted.weight)
    parts = minibatches(found, failed, config())
    assert [part.names for part in parts] == [part.names for part in minibatches(wanted, groups(), masking)]


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_a_dialogue_that_a_failed_call_ended_changes_nothing_for_the_rest_of_its_group(baseline):
    failed, without, settings = groups(), groups(), config(f"objective.baseline={baseline}")
    for sample in failed[3].samples[1:3]:
        sample.environment_status = "error"
    without[3].samples[1:3] = []
    kept, old = [*range(8), 10], logprobs()
    found = build_batch(failed, settings, 1, old=old, reference=None)
    of_kept = TokenLogprobs([old.logp[i] for i in kept], [old.entropy[i] for i in kept])
    wanted = build_batch(without, settings, 1, old=of_kept, reference=None)
    for name in ("advantage", "group_mean", "group_std", "variance", "clip_low", "clip_high", "weight", "pass_rate_bin"):
        assert torch.equal(getattr(found, name)[kept], getattr(wanted, name)), name
    assert not found.advantage[8:10].any() and not found.weight[8:10].any()


def test_the_mean_of_shaped_rewards_is_of_the_responses_that_count():
    overrides = ["reward.overlong_buffer=3", "rollout.max_response_tokens=7"]
    failed, settings = groups(), config(*overrides)
    for sample in failed[3].samples[1:3]:
        sample.environment_status = "error"
    batch = build_batch(failed, settings, 1, old=logprobs(), reference=None)
    means = [batch.group_mean[i].item() for i in (0, 2, 5, 7)]
    wanted = (2 * means[0] + 3 * means[1] + 2 * means[2] + 2 * means[3]) / 9
    row = step_metrics(3, failed, batch, [update(33.0, ratio=33.0, ratio_squared=33.0)], settings)
    assert row["reward_shaped_mean"] == pytest.approx(wanted)


def test_a_group_is_flat_if_the_rewards_that_count_are_equal():
    (group,) = groups()[:1]
    for sample in group.samples:
        sample.reward = 1.0
    group.samples[0].reward = 0.0
    assert not group.has_zero_variance
    group.samples[0].environment_status = "timeout"
    assert group.has_zero_variance
    for sample in group.samples:
        sample.environment_status = "timeout"
    assert group.has_zero_variance


def test_a_minibatch_of_truncated_responses_alone_has_no_weight():
    cut = groups()
    for sample in (sample for group in cut[2:] for sample in group.samples):
        sample.finish_reason = "length"
    masking = config("objective.mask_truncated=true")
    first, second = minibatches(build_batch(cut, masking, 1, old=logprobs(), reference=None), cut, masking)
    assert first.weight.sum() > 0 and len(second) == 6 and not second.weight.any()


def test_radii_of_truncated_responses_do_not_count_where_the_loss_leaves_them_out():
    matched, masked = "objective.preset=etr_matched", "objective.mask_truncated=true"
    etr, found = batch_of(masked), batch_of(matched, masked)
    kept = [1, 3, 4, 8, 9, 10]  # 6, which is not cut off either, has no advantage
    tokens = torch.tensor([FLAT_LENGTHS[i] for i in kept]).float()
    assert found.clip_low[0].item() == pytest.approx((etr.clip_low[kept] @ tokens / tokens.sum()).item())
    dealt = batch_of("objective.preset=etr_shuffled", masked).clip_low
    assert sorted(dealt[kept].tolist()) == sorted(etr.clip_low[kept].tolist())
    rows = [1, 3, 4, 6, 8, 9, 10]
    of_tokens = np.repeat(((etr.clip_low + etr.clip_high) / 2)[rows].double().numpy(), [FLAT_LENGTHS[i] for i in rows])
    row = metrics_row(etr, masked)
    for percent in (10, 90):
        wanted = np.quantile(of_tokens, percent / 100, method="inverted_cdf")
        assert row[f"clip_radius_p{percent}"] == pytest.approx(wanted)
    assert row["clip_radius_p10"] != metrics_row(batch_of())["clip_radius_p10"]


def test_kl_in_the_reward_is_subtracted_before_the_groups_are_compared():
    old, reference = logprobs(seed=3), logprobs(seed=4)
    overrides = ["objective.preset=dr_grpo", "objective.kl_coef=0.5"]
    in_loss = batch_of(*overrides, old=old, reference=reference)
    in_reward = batch_of(*overrides, "objective.kl_in=reward", old=old, reference=reference)
    assert torch.equal(in_loss.advantage, batch_of("objective.preset=dr_grpo").advantage)
    for batch in (in_loss, in_reward):
        assert batch.ref_logp == reference.logp and batch.old_logp == old.logp and batch.old_entropy == old.entropy
    kl = [float((a.double() - b.double()).sum()) for a, b in zip(old.logp, reference.logp, strict=True)]
    first = [1.0 - 0.5 * kl[0], 0.0 - 0.5 * kl[1]]
    assert in_reward.advantage[:2].tolist() == pytest.approx([(first[0] - first[1]) / 2, (first[1] - first[0]) / 2], abs=1e-6)
    assert torch.equal(in_reward.variance, in_loss.variance)
    assert loss_settings(config(*overrides).objective).kl_coef == 0.5
    assert loss_settings(config(*overrides, "objective.kl_in=reward").objective).kl_coef == 0.0


def test_the_loss_gets_each_rows_values_in_the_microbatchs_order():
    options = ["objective.correction=truncate", "objective.eps_high=0.28"]
    batch = batch_of(*options, old=logprobs(seed=5), reference=logprobs(seed=6))
    assert not torch.isclose(batch.clip_low, batch.clip_high).any()
    micro = pack(batch.sequences, [2, 10, 6], multiple=1, device=torch.device("cpu"))
    inputs = loss_inputs(batch, micro, loss_settings(config().objective), torch.neg)
    assert inputs.logp.isnan().all() and len(inputs.logp) == 2 + 7 + 2 and inputs.sequences.reduce is torch.neg
    for name in ("old_logp", "rollout_logp", "ref_logp", "correction"):
        wanted = torch.cat([getattr(batch, name)[i] for i in (2, 10, 6)])
        assert torch.equal(getattr(inputs, name), wanted)
    at = [2] * 2 + [10] * 7 + [6] * 2
    for name in ("advantage", "clip_low", "clip_high", "weight", "group_mean", "group_std", "variance"):
        assert torch.equal(getattr(inputs, name), getattr(batch, name)[at])
    assert pass_rate_bins_of_samples(batch, micro).tolist() == [2, 1, -1]
    assert inputs.sequences.index.tolist() == [0] * 2 + [1] * 7 + [2] * 2 and inputs.sequences.lengths.tolist() == [2, 7, 2]
    empty = loss_inputs(batch, pack(batch.sequences, [], multiple=2, device=torch.device("cpu")), inputs.settings)
    assert len(empty.old_logp) == 0 and len(empty.sequences.lengths) == 0


@pytest.mark.parametrize("name", ["logp", "rollout_logp", "correction"])
def test_a_value_that_is_not_finite_is_named_with_sample_position_and_rank(name):
    batch = batch_of("objective.correction=truncate")
    micro = pack(batch.sequences, [2, 10, 6], multiple=1, device=torch.device("cpu"))
    logp = torch.zeros(11)
    inputs = loss_inputs(batch, micro, loss_settings(config().objective)).at(slice(None), logp, logp)
    detector, nothing = NonFiniteDetector(batch, micro, loss="clipped", rank=3), torch.zeros(())
    whole = NonFiniteDetector(batch, micro, loss="clipped", rank=3)
    for one in (detector, whole):
        one.record(inputs, nothing)
    check_finite([whole, detector])
    broken = getattr(inputs, name).clone()
    broken[[6, 9]] = float("-inf")
    detector.record(replace(inputs, **{name: broken}), nothing)
    with pytest.raises(FloatingPointError) as caught:
        check_finite([whole, detector])
    assert str(caught.value) == (f"{name} is -inf at an active token: position 4 in the response of sample p3@3/3, on rank 3")
    # An earlier token takes precedence over an earlier input.
    variance = inputs.variance.clone()
    variance[0] = float("nan")
    detector.record(replace(inputs, **{name: broken, "variance": variance}), nothing)
    with pytest.raises(FloatingPointError, match=r"^variance is nan at .*: position 0 in the response of sample p1@3/0"):
        check_finite([whole, detector])


@pytest.mark.parametrize(("loss", "error"), [("clipped", FloatingPointError), ("mine:loss", UserError)])
def test_of_gradients_that_are_not_finite_the_earliest_token_is_named(loss, error):
    batch = batch_of()
    micro = pack(batch.sequences, [2, 10], multiple=1, device=torch.device("cpu"))
    logp, entropy = torch.zeros(2, 9).requires_grad_().unbind()
    inputs = loss_inputs(batch, micro, loss_settings(config().objective)).at(slice(None), logp.detach(), entropy.detach())
    detector = NonFiniteDetector(batch, micro, loss=loss, rank=0)
    detector.watch(slice(None), logp, entropy)
    logp_factor, entropy_factor = torch.ones(2, 9)
    logp_factor[5] = entropy_factor[3] = float("nan")
    (logp * logp_factor + entropy * entropy_factor).sum().backward()
    wanted = rf"of objective\.loss {loss} with respect to entropy .*: position 1 in the response of sample p3@3/3, on rank 0"
    detector.record(inputs, torch.zeros(()))
    with pytest.raises(error, match=wanted):
        check_finite([detector])


@pytest.mark.parametrize(("loss", "error"), [("clipped", FloatingPointError), ("mine:loss", UserError)])
def test_a_loss_that_is_not_finite_names_its_samples(loss, error) -> None:
    batch = batch_of()
    micro = pack(batch.sequences, [2, 10], multiple=1, device=torch.device("cpu"))
    values = torch.zeros(9)
    inputs = loss_inputs(batch, micro, loss_settings(config().objective)).at(slice(None), values, values)
    detector = NonFiniteDetector(batch, micro, loss=loss, rank=3)
    detector.record(inputs, torch.tensor(float("inf")))
    with pytest.raises(error) as caught:
        check_finite([detector])
    wanted = f"samples {batch.names[2]}, {batch.names[10]}, on rank 3"
    assert str(caught.value) == f"objective.loss {loss} is inf although all of its inputs are finite: {wanted}"
    empty = pack(batch.sequences, [], multiple=2, device=torch.device("cpu"))  # as on a rank with fewer samples than others
    nothing = torch.zeros(0)
    inputs = loss_inputs(batch, empty, loss_settings(config().objective)).at(slice(None), nothing, nothing)
    detector = NonFiniteDetector(batch, empty, loss=loss, rank=1)
    detector.record(inputs, torch.tensor(float("nan")))
    with pytest.raises(error, match=r"are finite: a microbatch without rows, whose mean is NaN, on rank 1$"):
        check_finite([detector])


def test_the_corrections_log_ratio_is_bounded_like_the_losss():
    overrides = ["objective.correction=truncate", "objective.correction_cap=9", "objective.log_ratio_bound=0.5"]
    weights = torch.cat(batch_of(*overrides, old=logprobs(seed=7)).correction)
    log_weights = torch.cat(logprobs(seed=7).logp) + 1.0
    assert log_weights.min() < -0.5 and log_weights.max() > 0.5
    torch.testing.assert_close(weights, log_weights.clamp(-0.5, 0.5).exp())
