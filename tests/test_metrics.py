"""The log-prob gate and the rows of metrics: how a step's groups, batch and updates are counted."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from etr_megatron import trainer
from etr_megatron.config import Config
from etr_megatron.flops import bf16_peak
from etr_megatron.metrics import check_logprob_gap, generated_by_version, rollout_metrics, training_speed
from etr_megatron.observe.metrics import PASS_RATE_KEYS, ROLLOUT_METRIC_KEYS, TRAIN_SET_KEYS, MetricsLog, keys_by_set
from etr_megatron.policy import PolicyBatch, TokenLogprobs
from tests.batches import FLAT_LENGTHS, batch_of, config, groups, logprobs, metrics_row, update, with_old


def test_the_gate_lets_agreement_pass_and_names_the_worst_sample_otherwise():
    check_logprob_gap(with_old(1e-6), config())
    batch = with_old(1e-2)
    worse = [logp.clone() for logp in batch.old_logp]
    worse[3][2] += 1.0
    with pytest.raises(RuntimeError, match=r"sample p1@3/1\), more than rollout\.max_logprob_gap=0\.0001"):
        check_logprob_gap(replace(batch, old_logp=tuple(worse)), config())
    worse[7][0] = float("nan")
    with pytest.raises(RuntimeError, match=r"by nan on average \(worst nan, sample p3@3/0\)"):
        check_logprob_gap(replace(batch, old_logp=tuple(worse)), config())


def test_the_gate_looks_at_tokens_of_the_trainers_own_weights_alone():
    """Tokens of versions other than 7 are far off: all of sample p0@3/0, and the first three of p1@3/1."""
    step = groups()
    step[0].samples[0].weight_version = 8
    step[1].samples[1].weight_versions = array("i", [5, 6, 6, 7, 7])
    of_7 = generated_by_version(step, 7)
    assert (~of_7).nonzero()[:, 0].tolist() == [0, 1, 2, 6, 7, 8]
    off = torch.where(of_7, 1e-6, 1.0)
    off[5] += 0.5  # and so is one token of version 7, in sample p1@3/0

    def batch(gap: torch.Tensor) -> PolicyBatch:
        return replace(with_old(0.0), old_logp=(gap - 1.0).split(FLAT_LENGTHS))

    with pytest.raises(RuntimeError, match=r"by 1\.85e-02 on average \(worst 5\.00e-01, sample p1@3/0\)"):
        check_logprob_gap(batch(off), config(), of_7)
    off[5] -= 0.5
    assert check_logprob_gap(batch(off), config(), of_7) is True
    assert check_logprob_gap(batch(off), config(), generated_by_version(step, 4)) is False
    with pytest.raises(RuntimeError, match="on average"):
        check_logprob_gap(batch(off), config())


def test_the_gate_names_the_worst_sample_beside_a_response_without_tokens():
    batch = replace(with_old(0.0), old_logp=tuple(torch.full((n,), gap) for n, gap in ((0, 0.0), (2, -1.1), (1, -1.4))))
    batch = replace(batch, rollout_logp=tuple(torch.full((n,), -1.0) for n in (0, 2, 1)))
    with pytest.raises(RuntimeError, match=r"worst 4\.00e-01, sample p1@3/0"):
        check_logprob_gap(batch, config())


def test_metrics_are_means_over_all_tokens_of_all_updates():
    updates = [
        update(10.0, ratio=11.0, ratio_squared=13.0, clip_upper=1.0, clip_radius=2.0, kl=3.0),
        update(30.0, ratio=29.0, ratio_squared=37.0, clip_upper=3.0, clip_lower=2.0, loss=3.0, grad_norm=4.0, lr=2e-3),
    ]
    row = metrics_row(with_old(1e-2), updates=updates)
    assert row["ratio_mean"] == 1.0 and row["clip_frac_upper"] == 0.1 and row["clip_frac_lower"] == 0.05
    assert row["clip_radius_mean"] == 0.05 and row["kl"] == 0.075
    assert row["effective_sample_size"] == pytest.approx(40**2 / (40 * 50))
    assert row["loss"] == 2.0 and row["grad_norm"] == 3.0 and row["lr"] == 2e-3
    assert row["zero_variance_groups"] == 1 and row["truncated"] == 4 and row["weight_version"] == 7
    assert row["reward_mean"] == pytest.approx(4 / 11) and row["response_tokens_mean"] == pytest.approx(33 / 11)
    assert row["logprob_gap_mean"] == pytest.approx(1e-2, abs=1e-6) and row["entropy"] == 1.0
    assert row["mismatch_kl"] == pytest.approx(math.exp(1e-2) - 1 - 1e-2, rel=1e-3)
    assert row["correction_mean"] == 1.0 and row["correction_frac"] == 0.0


def test_without_the_trainers_log_probs_the_first_update_says_what_was_before_the_updates():
    sums = dict(ratio=10.0, ratio_squared=10.0, gap=0.4, mismatch=0.02)
    updates = [update(10.0, entropy=25.0, **sums), update(30.0, entropy=1.0, ratio=30.0, ratio_squared=30.0, gap=9.0)]
    row = metrics_row(with_old(1e-2).relative_to_engine(), updates=updates)
    assert row["entropy"] == 2.5 and row["logprob_gap_mean"] == 0.04 and row["mismatch_kl"] == 0.002
    assert math.isnan(row["logprob_gap_max"]) and row["ratio_mean"] == 1.0


@pytest.mark.parametrize(("old_logp", "passes"), [("trainer", [1, 2, 3]), ("engine", [1, 1, 1])])
def test_with_the_engines_log_probs_the_trainer_computes_its_own_for_the_gate_alone(old_logp, passes):
    policy = mock.MagicMock(has_reference=False)
    policy.logprobs.return_value = own = logprobs(-1.0 + 1e-6)
    others = "sampler", "held_out", "decode", "directory", "grader", "recorder", "stop_request", "phases"
    arguments = dict(policy=policy, engine=mock.Mock(), **dict.fromkeys(others, mock.MagicMock()))
    one = trainer.Trainer(config(f"objective.old_logp={old_logp}"), **arguments)
    found = []
    for one.step in (8, 9, 10):  # tokens are of version 7, so the gate compares them at step 8
        batch, updates = one._train(groups())
        found.append(policy.logprobs.call_count)
        assert len(updates) == 2
        wanted = own.logp if old_logp == "trainer" else batch.rollout_logp
        parts = [call.args[0] for call in policy.update.call_args_list[-2:]]
        assert torch.equal(torch.cat([logp for part in parts for logp in part.old_logp]), torch.cat(wanted))
    assert found == passes
    policy.logprobs.return_value = logprobs(-2.0)
    other = trainer.Trainer(config(f"objective.old_logp={old_logp}"), **arguments)
    other.step = 8
    with pytest.raises(RuntimeError, match="the engine's log-probs differ"):
        other._train(groups())


@pytest.mark.parametrize("rolls_out_only", [False, True])
def test_servers_are_counted_when_a_steps_rollout_is_complete_before_a_sync_brings_others_back(monkeypatch, rolls_out_only):
    serving, rows = [4], []
    sampler = mock.Mock(take=lambda *_: serving.__setitem__(0, serving[0] - 1) or SimpleNamespace(groups=[], counts={}))
    engine = mock.Mock(metrics=lambda: {"servers_serving": serving[0]})
    engine.update_weights = lambda *_args, **_options: serving.__setitem__(0, 4)
    others = "policy", "held_out", "decode", "directory", "grader", "recorder", "stop_request", "phases"
    one = trainer.Trainer(Config(), engine=engine, sampler=sampler, **dict.fromkeys(others, mock.MagicMock()))
    one.config = replace(one.config, run=replace(one.config.run, steps=2), checkpoint=replace(one.config.checkpoint, every=0))
    kept = dict(_write_record=lambda *_: None, _train=lambda _groups: (None, []), _is_evaluated=lambda _step: False)
    for name in ("step_metrics", "rollout_metrics"):
        monkeypatch.setattr(trainer, name, lambda *_: {})
    with mock.patch.multiple(one, **kept, _evaluate=dict, _record=lambda row, _groups: rows.append(row)):
        one._run_rollout_only() if rolls_out_only else one._run_steps()
    assert rows == [{"servers_serving": 3}, {"servers_serving": 2 if rolls_out_only else 3}]


def test_a_steps_groups_are_counted_each_for_what_it_is():
    step = groups()
    samples = [sample for group in step for sample in group.samples]
    for sample, status in zip(samples, ["timeout"] * 3 + ["ok"] * 6 + ["error"] * 2, strict=True):
        sample.reward_status = status
    samples[1].reward, samples[4].weight_version = 0.5, 9  # neither wrong nor right; from newer weights than the others
    row = rollout_metrics(3, step, config())
    assert row["step"] == 3 and row["weight_version"] == 9
    assert row["accuracy"] == pytest.approx(4 / 11) and row["reward_mean"] == pytest.approx(4.5 / 11)
    assert row["reward_timeouts"] == 3 and row["reward_errors"] == 2 and row["truncated"] == 4
    assert row["zero_variance_groups"] == 1 and row["response_tokens_mean"] == 3.0
    assert not any(key.startswith("train/") for key in row)


def test_parts_of_rewards_are_means_over_the_samples_that_have_them(tmp_path):
    step = groups()
    for group, name in zip(step, ("a", "b", "b", "b"), strict=True):
        group.problem.id = f"{name}/x:{group.problem.id}"
    step[0].samples[0].reward_parts = {"format": 1.0, "accuracy": 0.5}
    step[1].samples[2].reward_parts = {"format": 0.25}
    row = rollout_metrics(3, step, config("data.train={a: a.jsonl, b: b.jsonl}"))
    wanted = {"reward/format": 0.625, "reward/accuracy": 0.5, "train/a/reward/format": 1.0, "train/b/reward/format": 0.25}
    assert {key: value for key, value in row.items() if "reward/" in key} == wanted | {"train/a/reward/accuracy": 0.5}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(row | {key: 0.0 for key in ROLLOUT_METRIC_KEYS if key.startswith(("tokens", "time"))})
    assert row.items() <= log.rows()[0].items()
    assert keys_by_set(row, "train/", "accuracy") == {"a": "train/a/accuracy", "b": "train/b/accuracy"}


def test_groups_are_counted_by_the_training_set_that_their_problem_is_from(tmp_path):
    step = groups()
    for group, name in zip(step, ("long", "sums", "long", "sums"), strict=True):
        group.problem.id = f"{name}/a/b:{group.problem.id}"
    row = rollout_metrics(3, step, config("data.train={sums: arithmetic, long: l.jsonl, lo: r.jsonl}"))
    for name, own in (("sums", step[1::2]), ("long", step[::2])):
        alone = rollout_metrics(3, own, config())
        assert row[f"train/{name}/groups"] == 2
        assert all(row[f"train/{name}/{key}"] == alone[key] for key in TRAIN_SET_KEYS[1:])
    assert {key: value for key, value in row.items() if key.startswith("train/lo/")} == {"train/lo/groups": 0}
    assert {key.rpartition("/")[2] for key in row if key.startswith("train/sums")} == set(TRAIN_SET_KEYS)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(row | {key: 0.0 for key in ROLLOUT_METRIC_KEYS if key.startswith(("tokens", "time"))})
    assert row.items() <= log.rows()[0].items()


def test_the_balance_of_experts_is_the_mean_over_the_steps_updates():
    updates = [replace(update(33.0, ratio_squared=1.0), balance={"expert_load_imbalance": found}) for found in (1.5, 2.0)]
    assert metrics_row(with_old(0.0), updates=updates)["expert_load_imbalance"] == 1.75


def test_memory_is_the_highest_of_the_steps_updates():
    peaks = [
        {"memory_allocated_gib": 5.0, "memory_reserved_gib": 8.0},
        {"memory_allocated_gib": 6.0, "memory_reserved_gib": 7.0},
    ]
    updates = [replace(update(33.0, ratio_squared=1.0), memory=found) for found in peaks]
    row = metrics_row(with_old(0.0), updates=updates)
    assert (row["memory_allocated_gib"], row["memory_reserved_gib"]) == (6.0, 8.0)


def test_entropy_and_the_gap_to_the_engine_are_over_tokens_not_samples():
    tokens = torch.arange(33.0)
    old = TokenLogprobs((tokens / 64 - 1.25).split(FLAT_LENGTHS), (tokens**2).split(FLAT_LENGTHS))
    row = metrics_row(batch_of(old=old))
    gaps = np.abs(np.arange(33) / 64 - 0.25)  # the engine's log-probs are all -1
    assert row["entropy"] == pytest.approx(np.mean(np.arange(33.0) ** 2))
    assert row["logprob_gap_mean"] == pytest.approx(gaps.mean()) and row["logprob_gap_max"] == gaps.max() == 0.25


def test_the_kl_to_the_engine_is_bounded_like_the_losss():
    row = metrics_row(with_old(2.0), "objective.log_ratio_bound=0.5")
    assert row["mismatch_kl"] == pytest.approx(math.exp(0.5) - 1 - 0.5)


def test_the_reward_is_told_after_shaping_where_a_kl_is_taken_from_it():
    old, reference = logprobs(seed=3), logprobs(seed=4)
    shaped = ["objective.preset=dr_grpo", "objective.kl_in=reward", "objective.kl_coef=0.5"]
    row = metrics_row(batch_of(*shaped, old=old, reference=reference), *shaped)
    kl = (torch.cat(old.logp).double() - torch.cat(reference.logp).double()).sum().item()
    assert row["reward_shaped_mean"] == pytest.approx((4 - 0.5 * kl) / 11) and row["reward_mean"] == pytest.approx(4 / 11)
    off = [*shaped[:2], "objective.kl_coef=0"]
    assert "reward_shaped_mean" not in metrics_row(batch_of(*off, old=old), *off)


@pytest.mark.parametrize(("has_reference", "passes"), [(False, 13), (True, 14)])
def test_a_ranks_speed_counts_the_passes_over_whole_sequences_that_training_takes(monkeypatch, has_reference, passes):
    """For a model with 2e12 FLOP per token and 3e13 per row of its head: 4 epochs of 3 passes each, plus the log-probs."""
    monkeypatch.setattr("etr_megatron.metrics.sequence_flops", lambda arch, tokens, rows: arch * tokens + 3e13 * rows)
    policy = SimpleNamespace(has_reference=has_reference, arch=2e12, layout=SimpleNamespace(world=5))
    settings = ["train.epochs=4", "objective.mask_truncated=true"]
    found = training_speed(policy, groups(), config(settings[0]), seconds=8.0)
    of_all = 2 * (33 + 11 * 2) + 30 * 33  # 33 response tokens, 11 prompts of 2 tokens
    assert found == {"tflops_per_gpu": pytest.approx(passes * of_all / 8.0 / 5)}
    assert training_speed(policy, groups(), config(settings[0]), seconds=0.0) == {}
    # The first response of each group was cut off; they have 12 tokens.
    of_masked = 2 * (12 + 4 * 2) + 30 * 12
    found = training_speed(policy, groups(), config(*settings), seconds=8.0)
    assert found == {"tflops_per_gpu": pytest.approx((passes * of_all - 12 * of_masked) / 8.0 / 5)}


def test_a_losss_own_rows_become_metrics_of_their_own():
    row = metrics_row(with_old(0.0), updates=[update(40.0, ratio_squared=1.0, **{"loss/gap": 10.0, "loss/gap_pass_0_25": 4.0})])
    assert row["loss/gap"] == 0.25 and "loss/gap_pass_0_25" not in row


def test_clip_metrics_by_pass_rate_are_there_where_a_bin_has_tokens():
    # Pass rates 1/2, 2/3, 0 and 1/4: two groups in the third bin, one in the second, one without variance.
    batch = batch_of("objective.eps_high=0.28")
    assert batch.pass_rate_bin.tolist() == [2, 2, 2, 2, 2, -1, -1, 1, 1, 1, 1]
    sums = {"tokens_pass_25_50": 10.0, "clip_upper_pass_25_50": 2.0, "clip_radius_pass_25_50": 1.5}
    sums |= {"tokens_pass_50_75": 15.0, "clip_lower_pass_50_75": 3.0}
    row = metrics_row(batch, updates=[update(33.0, ratio_squared=1.0, **sums)])
    assert {key for key in row if "_pass_" in key} <= set(PASS_RATE_KEYS)
    assert not any(key.endswith(("_pass_0_25", "_pass_75_100")) for key in row)
    assert row["clip_frac_upper_pass_25_50"] == 0.2 and row["clip_frac_lower_pass_50_75"] == 0.2
    assert row["clip_radius_mean_pass_25_50"] == 0.15
    # Of the fourth group's 10 tokens, 9 belong to wrong answers (radii 0.140 and 1.4 x that) and 1 to the right one.
    assert row["clip_radius_p10_pass_25_50"] == row["clip_radius_p90_pass_25_50"] == pytest.approx(1.2 * 0.140, abs=1e-3)
    means = ((batch.clip_low + batch.clip_high) / 2).tolist()
    radius = torch.cat([torch.full((n,), x) for n, x in zip(FLAT_LENGTHS, means, strict=True)])
    for percent in (10, 90):
        wanted = np.quantile(radius.numpy(), percent / 100, method="inverted_cdf")
        assert row[f"clip_radius_p{percent}"] == pytest.approx(float(wanted))


@pytest.mark.parametrize("how", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics_tell_how_often_the_correction_acted(how, level):
    overrides = [f"objective.correction={how}", f"objective.correction_level={level}", "objective.correction_cap=1.3"]
    overrides.append("objective.correction_floor=0.8")
    old = logprobs(seed=7)
    row = metrics_row(batch_of(*overrides, old=old), *overrides)
    weights, acted = [], []
    for logp in old.logp:  # the engine's log-probs are all -1
        log_weight = logp.double().numpy() + 1.0
        weight = np.exp(log_weight if level == "token" else np.full_like(log_weight, log_weight.sum()))
        outside = weight > 1.3 if how == "truncate" else (weight > 1.3) | (weight < 0.8)
        weights.extend(np.minimum(weight, 1.3) if how == "truncate" else np.where(outside, 0.0, weight))
        acted.extend(outside)
    assert 0 < np.mean(acted) < 1
    assert row["correction_frac"] == pytest.approx(np.mean(acted)) and row["correction_mean"] == pytest.approx(np.mean(weights))


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40S", None),
    ],
)
def test_a_devices_peak_is_known_by_the_first_words_of_its_name(device, tflops):
    assert bf16_peak(device) == (None if tflops is None else tflops * 1e12)
