"""What happens before any split: advantages and ranges by group, minibatches of whole groups, denominators, the gate."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace

import pytest
import torch

from etr_megatron.batching import build_batch, minibatches
from etr_megatron.config import load_config, resolve
from etr_megatron.metrics import check_logprob_gap, step_metrics
from etr_megatron.policy import Update
from etr_megatron.types import Group, Problem, Sample

LENGTHS = [[3, 1], [2, 5, 4], [6, 2], [1, 1, 1, 7]]
REWARDS = [[1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def config(*overrides: str):
    return resolve(load_config(None, ["rollout.prompts_per_step=4", "train.minibatches=2", *overrides]), 1, cuda=False)


def groups() -> list[Group]:
    made = []
    for number, (lengths, rewards) in enumerate(zip(LENGTHS, REWARDS, strict=True)):
        samples = [
            Sample(i, list(range(n)), [-1.0] * n, "stop" if i else "length", 7, reward=r, reward_status="ok")
            for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
        ]
        made.append(Group(f"p{number}@3", Problem(f"p{number}", "", "", [1, 2]), samples))
    return made


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant_length"])
def test_minibatches_are_whole_groups_with_their_own_denominator(how):
    settings = config(f"objective.aggregation={how}", "objective.constant_length=10")
    batch = build_batch(groups(), settings, 1)
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


def test_advantages_and_ranges_come_from_each_samples_own_group():
    batch = build_batch(groups(), config(), 1)
    assert batch.advantage[:2].tolist() == pytest.approx([1.0, -1.0], abs=1e-4)
    assert batch.advantage[2:5].tolist() == pytest.approx([0.7071, 0.7071, -1.4142], abs=1e-3)
    assert batch.advantage[5:7].tolist() == [0.0, 0.0]
    assert batch.advantage[7:].tolist() == pytest.approx([1.7320, -0.5774, -0.5774, -0.5774], abs=1e-3)
    # k of G = 1/4 with the etr preset: 0.230 for the correct response, 0.140 for a wrong one.
    assert batch.clip_high[7].item() == pytest.approx(0.230, abs=1e-3)
    assert batch.clip_high[8].item() == pytest.approx(0.140, abs=1e-3)


def with_old(gap: float):
    batch = build_batch(groups(), config(), 1)
    old = tuple(logp + gap for logp in batch.rollout_logp)
    return replace(batch, old_logp=old, old_entropy=tuple(torch.ones_like(logp) for logp in old))


def test_the_gate_lets_agreement_pass_and_names_the_worst_sample_otherwise():
    check_logprob_gap(with_old(1e-6), config())
    batch = with_old(1e-2)
    worse = [logp.clone() for logp in batch.old_logp]
    worse[3][2] += 1.0
    with pytest.raises(RuntimeError, match=r"sample p1@3/1\), more than rollout\.max_logprob_gap=0\.0001"):
        check_logprob_gap(replace(batch, old_logp=tuple(worse)), config())


def test_metrics_are_means_over_all_tokens_of_all_updates():
    names = ("tokens", "ratio", "clip_upper", "clip_lower", "clip_radius", "kl", "entropy")
    updates = [
        Update(1.0, dict(zip(names, (10.0, 11.0, 1.0, 0.0, 2.0, 0.0, 5.0), strict=True)), 2.0, 1e-3),
        Update(3.0, dict(zip(names, (30.0, 29.0, 3.0, 2.0, 6.0, 0.0, 5.0), strict=True)), 4.0, 2e-3),
    ]
    row = step_metrics(3, groups(), with_old(1e-2), updates, config())
    assert row["ratio_mean"] == 1.0 and row["clip_frac_upper"] == 0.1 and row["clip_frac_lower"] == 0.05
    assert row["loss"] == 2.0 and row["grad_norm"] == 3.0 and row["lr"] == 2e-3
    assert row["zero_variance_groups"] == 1 and row["truncated"] == 4 and row["weight_version"] == 7
    assert row["reward_mean"] == pytest.approx(4 / 11) and row["response_tokens_mean"] == pytest.approx(33 / 11)
    assert row["logprob_gap_mean"] == pytest.approx(1e-2, abs=1e-6) and row["entropy"] == 1.0


def radii(preset: str, step: int = 1):
    batch = build_batch(groups(), config(f"objective.preset={preset}"), step)
    return batch.clip_low, batch.advantage != 0


def test_the_matched_control_is_fixed_at_etrs_mean_radius_over_the_tokens_that_learn():
    etr, active = radii("etr")
    matched, _ = radii("etr_matched")
    tokens = torch.tensor(functools.reduce(operator.iadd, LENGTHS, [])).float()
    assert len(set(matched.tolist())) == 1
    assert matched[0].item() == pytest.approx((etr * tokens)[active].sum().item() / tokens[active].sum().item())


def test_the_shuffled_control_deals_out_the_same_radii_to_other_samples():
    etr, active = radii("etr")
    dealt = [radii("etr_shuffled", step)[0] for step in (1, 2, 1)]
    for found in dealt:
        assert sorted(found[active].tolist()) == sorted(etr[active].tolist())
        assert torch.equal(found[~active], etr[~active])
    assert not torch.equal(dealt[0], etr) and not torch.equal(dealt[0], dealt[1])
    assert torch.equal(dealt[0], dealt[2])


def test_the_inverted_control_gives_less_where_the_variance_is_highest():
    etr, _ = radii("etr")
    inverted, _ = radii("etr_inverted_macro")
    # Group 0 passes 1 in 2 (v = 1), group 3 passes 1 in 4 (v = 3/4).
    assert etr[0].item() == pytest.approx(0.2, abs=1e-5) and inverted[0].item() == pytest.approx(0.1, abs=1e-5)
    assert (inverted[7] / etr[7]).item() == pytest.approx((1 - 0.5 * 0.75) / (1 - 0.5 + 0.5 * 0.75), abs=1e-5)
