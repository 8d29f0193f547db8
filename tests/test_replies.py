"""Batches and metrics of responses with replies between the model's turns: as if there were only what the model drew, except
that the limit of a response, and the context of what is drawn, include the replies."""

from __future__ import annotations

from array import array
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from etr_megatron.batching import build_batch, minibatches, sequences_of
from etr_megatron.evaluation import evaluation_metrics
from etr_megatron.metrics import generated_by_version, rollout_metrics, step_metrics, training_speed
from etr_megatron.observe.metrics import ROLLOUT_METRIC_KEYS, MetricsLog, MetricsRow
from etr_megatron.policy import PolicyBatch, TokenLogprobs
from etr_megatron.trainer import Trainer
from etr_megatron.types import Group, Sample
from tests.batches import FLAT_LENGTHS, config, groups, logprobs, update

ENVIRONMENT = "environment.function=mine:reply"


MASKS = {2: "1001", 3: "1101101", 5: "1001111001", 8: "10", 10: "1001111101"}
"""Of samples by number; the others have no replies."""


def with_replies() -> list[Group]:
    """`groups()`, whose tokens are what the model drew, with tokens of replies put in between."""
    made = groups()
    for number, sample in enumerate(flat(made)):
        mask = [int(one) for one in MASKS.get(number, "1" * len(sample.response_ids))]
        ids, logps = iter(sample.response_ids), iter(torch.linspace(-1.5, -0.5, sum(mask)).tolist())
        sample.response_ids = array("i", [next(ids) if is_drawn else 77 for is_drawn in mask])
        sample.rollout_logprobs = array("d", [next(logps) if is_drawn else 0.0 for is_drawn in mask])
        sample.loss_mask = array("B", mask if number in MASKS else [])
    return made


def drawn_only() -> list[Group]:
    """The same groups, from which the replies have been removed."""
    made = with_replies()
    for number, sample in enumerate(flat(made)):
        kept = [place for place, one in enumerate(MASKS.get(number, "1" * len(sample.response_ids))) if one == "1"]
        sample.response_ids = array("i", [sample.response_ids[place] for place in kept])
        sample.rollout_logprobs = array("d", [sample.rollout_logprobs[place] for place in kept])
        sample.loss_mask = array("B")
    return made


def flat(made: list[Group]) -> list[Sample]:
    return [sample for group in made for sample in group.samples]


def test_the_cases_differ_in_replies_alone():
    for made in (with_replies(), drawn_only()):
        assert [sample.num_generated for sample in flat(made)] == FLAT_LENGTHS
    assert [len(sample.response_ids) for sample in flat(with_replies())] == [3, 1, 4, 7, 4, 10, 2, 1, 2, 1, 10]
    assert [sample.turns for sample in flat(with_replies())] == [1, 1, 2, 3, 1, 3, 1, 1, 1, 1, 3]


def assert_same(found: PolicyBatch, wanted: PolicyBatch) -> None:
    for field in fields(PolicyBatch):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "sequences":
            continue
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif a is not None and field.name != "names":
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), field.name
        else:
            assert a == b, field.name


OBJECTIVES = {
    "etr": [],
    "sequence_mean": ["objective.aggregation=sequence_mean"],
    "constant_length": ["objective.aggregation=constant_length", "objective.constant_length=10"],
    "matched": ["objective.preset=etr_matched"],
    "gspo": ["objective.preset=gspo"],
    "correction_of_tokens": ["objective.correction=truncate", "objective.correction_cap=1.1"],
    "correction_of_sequences": ["objective.correction=mask", "objective.correction_level=sequence"],
    "kl_in_the_reward": ["objective.preset=dr_grpo", "objective.kl_coef=0.5", "objective.kl_in=reward"],
    "without_truncated": ["objective.mask_truncated=true", "objective.aggregation=sequence_mean"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_and_metrics_are_those_of_what_the_model_drew(objective):
    settings = config(*OBJECTIVES[objective])
    old, reference = logprobs(seed=1), logprobs(seed=2) if "kl" in objective else None
    both = [build_batch(made, settings, 1, old=old, reference=reference) for made in (with_replies(), drawn_only())]
    assert_same(*both)
    for parts in zip(minibatches(both[0], with_replies(), settings), minibatches(both[1], drawn_only(), settings), strict=True):
        assert_same(*parts)
    rows = [
        step_metrics(3, made, batch, [update(33.0, ratio=33.0, ratio_squared=33.0)], settings)
        for made, batch in zip((with_replies(), drawn_only()), both, strict=True)
    ]
    assert rows[0].pop("response_tokens_mean") == 45 / 11 and rows[1].pop("response_tokens_mean") == 33 / 11
    assert rows[0] == rows[1]


def test_percentiles_of_radii_are_over_what_the_model_drew():
    batch = build_batch(with_replies(), config(), 1, old=logprobs(), reference=None)
    batch = replace(batch, clip_low=torch.arange(11.0), clip_high=torch.arange(11.0))
    row = step_metrics(3, with_replies(), batch, [update(33.0, ratio_squared=1.0)], config())
    # A tenth is 3.3 of 33 tokens; with replies it would be 4.5 of 45, and the first two samples have 4.
    assert row["clip_radius_p10"] == 1.0 and row["clip_radius_p90"] == 10.0


def test_the_policy_sees_replies_and_is_told_which_tokens_they_are():
    found = sequences_of(with_replies())
    assert [list(part) for part in found[2]] == [[1, 2], [0, 77, 77, 1], [1, 0, 0, 1]]
    assert not found[0].loss_mask and [one.rows for one in found] == FLAT_LENGTHS


def test_the_penalty_of_long_responses_counts_replies():
    options = ["objective.preset=dr_grpo", "rollout.max_response_tokens=10"]
    penalty = ["reward.overlong_buffer=4", "reward.overlong_penalty=1.0"]
    plain, found = (
        build_batch(with_replies(), config(*options, *more), 1, old=logprobs(), reference=None).group_mean
        for more in ((), penalty)
    )
    # With 10 tokens, of which 4 are in the buffer, the whole penalty; with 7, a fourth of it.
    assert (plain - found).tolist() == pytest.approx([0] * 2 + [0.25 / 3] * 3 + [1 / 2] * 2 + [1 / 4] * 4)


def test_the_gate_compares_what_the_model_drew_from_the_trainers_weights():
    made = with_replies()
    made[2].samples[0].weight_versions = array("i", [7] * 4 + [8] * 6)  # of these the model drew 2 and 4
    of_7 = generated_by_version(made, 7)
    assert len(of_7) == 33 and of_7.sum() == 29
    assert of_7.split(FLAT_LENGTHS)[5].tolist() == [True, True, False, False, False, False]


def test_turns_replies_and_failed_calls_are_told_with_an_environment_alone(tmp_path):
    made = with_replies()
    for sample, status in zip(flat(made), ["ok", "error", "timeout", "error", *[None] * 7], strict=True):
        sample.environment_status = status
    row = rollout_metrics(3, made, config(ENVIRONMENT))
    assert row["turns_mean"] == 18 / 11 and row["reply_tokens_mean"] == 12 / 11
    assert row["environment_errors"] == 2 and row["environment_timeouts"] == 1
    plain = rollout_metrics(3, made, config())
    new = ("turns_mean", "reply_tokens_mean", "environment_errors", "environment_timeouts")
    assert not any(key in plain for key in new) and {key: row[key] for key in plain} == plain
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(row | {key: 0.0 for key in ROLLOUT_METRIC_KEYS if key.startswith(("tokens", "time"))})
    assert row.items() <= log.rows()[0].items()


def test_turns_replies_and_failed_calls_of_evaluations_have_keys_of_rows():
    sets = {"": with_replies()}
    for sample, status in zip(flat(sets[""]), ["ok", "error", "timeout", *[None] * 8], strict=True):
        sample.environment_status = status
    found = evaluation_metrics(sets, config(ENVIRONMENT))
    assert found["eval_turns_mean"] == 18 / 11 and found["eval_reply_tokens_mean"] == 12 / 11
    assert found["eval_environment_failed_frac"] == 2 / 11
    assert found.keys() | {f"{key}_start" for key in found} <= MetricsRow.__annotations__.keys()
    without = evaluation_metrics(sets, config())
    assert not any(word in key for key in without for word in ("turns", "reply", "environment"))


def test_each_training_set_has_its_turns_and_replies():
    made = with_replies()
    for group, name in zip(made, "abbb", strict=True):
        group.problem.id = f"{name}/x:{group.problem.id}"
    row = rollout_metrics(3, made, config(ENVIRONMENT, "data.train={a: a.jsonl, b: b.jsonl}"))
    assert row["train/a/turns_mean"] == 1.0 and row["train/b/turns_mean"] == 16 / 9
    assert row["train/b/reply_tokens_mean"] == 12 / 9


def test_speed_counts_the_context_of_replies_and_the_head_of_what_the_model_drew(monkeypatch):
    monkeypatch.setattr("etr_megatron.metrics.sequence_flops", lambda arch, tokens, rows: 1e12 * tokens + 1e15 * rows)
    policy = SimpleNamespace(has_reference=False, arch=None, layout=SimpleNamespace(world=1))
    found = training_speed(policy, with_replies(), config("train.epochs=1"), seconds=1.0)
    assert found == {"tflops_per_gpu": pytest.approx(4 * (45 + 11 * 2) + 4e3 * 33)}


def test_tokens_per_second_are_what_the_model_drew():
    rows: list[dict[str, Any]] = []
    trainer = object.__new__(Trainer)
    settings = config("observe.rollouts_every=0")
    trainer.config, trainer.step = replace(settings, rollout=replace(settings.rollout, only=True)), 3
    trainer._watch = SimpleNamespace(lap=lambda: {"time_step": 2.0})
    trainer._saver = SimpleNamespace(times=lambda: {"time_checkpoint": 0.5})
    trainer._recorder = SimpleNamespace(record=rows.append)
    trainer._directory = SimpleNamespace(write_status=lambda *_: None)
    trainer._record({}, with_replies())
    assert rows == [{"time_step": 2.0, "time_checkpoint": 0.5, "tokens_per_s": 16.5}]


def test_a_response_that_is_a_reply_alone_counts_for_nothing():
    made = with_replies()
    made[0].samples[1].loss_mask = array("B", [0])
    sizes = [3, 0, *FLAT_LENGTHS[2:]]
    old = TokenLogprobs(*(torch.full((sum(sizes),), -1.0).split(sizes) for _ in range(2)))
    for options in OBJECTIVES.values():
        batch = build_batch(made, config(*options), 1, old=old, reference=old if "kl_coef" in str(options) else None)
        assert len(batch.rollout_logp[1]) == 0 and batch.weight.isfinite().all() and batch.clip_low.isfinite().all()
        row = step_metrics(3, made, batch, [update(32.0, ratio_squared=1.0)], config(*options))
        assert all(value == value for value in row.values())
