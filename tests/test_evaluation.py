"""Held-out sets: what is requested, and how the answers are counted."""

from __future__ import annotations

import pytest

from etr_megatron.evaluation import HeldOut, best_steps, evaluate, evaluation_metrics
from etr_megatron.observe.metrics import MetricsLog
from etr_megatron.reward import Grade
from etr_megatron.rollout import collect
from etr_megatron.types import FinishReason, Group, Problem, Sample
from tests.batches import config
from tests.test_observe import make_row


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(collect, "on_rank0", lambda body, *, long: body())


def graded(*rewards: tuple[float, ...], tokens: int = 2, finish: FinishReason = "stop") -> list[Group]:
    return [
        Group(
            f"g{i}",
            Problem(f"p{i}", "", "", [1]),
            [Sample(j, [2] * tokens, [-1.0] * tokens, finish, 0, reward=r) for j, r in enumerate(group)],
        )
        for i, group in enumerate(rewards)
    ]


def test_right_responses_and_problems_that_any_of_them_is_right_for_are_counted():
    """Of three problems, the first has both responses right, the second one of two, the third none: 3 of 6, and 2 of 3."""
    groups = graded((1.0, 1.0), (-1.0, 1.0), (-1.0, 0.5))
    groups[2].samples[0].finish_reason, groups[2].samples[1].finish_reason = "length", "abort"
    twice = config("reward.range_min=-1", "eval.samples=2", "eval.temperature=0.6")
    assert evaluation_metrics({"": groups}, twice) == {
        "eval_accuracy": 0.5,
        "eval_reward_mean": 1.5 / 6,
        "eval_pass_at_k": pytest.approx(2 / 3),
        "eval_response_tokens_mean": 2.0,
        "eval_truncated_frac": pytest.approx(1 / 6),
    }
    for group in groups:
        del group.samples[0]
    once = evaluation_metrics({"": groups}, config("reward.range_min=-1"))
    assert once == {
        "eval_accuracy": pytest.approx(2 / 3),
        "eval_reward_mean": pytest.approx(2.5 / 3),
        "eval_response_tokens_mean": 2.0,
        "eval_truncated_frac": 0.0,
    }


def test_of_several_sets_each_is_told_and_their_mean_whatever_their_sizes(tmp_path):
    sets = {"hard": graded((0.0,), tokens=30, finish="length"), "easy-1.0": graded((1.0,), (1.0,), (0.0,), tokens=5)}
    found = evaluation_metrics(sets, config())
    assert found == {
        "eval_accuracy": pytest.approx(1 / 3),
        "eval_reward_mean": pytest.approx(1 / 3),
        "eval_response_tokens_mean": 17.5,
        "eval_truncated_frac": 0.5,
        "eval/hard/accuracy": 0.0,
        "eval/hard/reward_mean": 0.0,
        "eval/hard/response_tokens_mean": 30.0,
        "eval/hard/truncated_frac": 1.0,
        "eval/easy-1.0/accuracy": pytest.approx(2 / 3),
        "eval/easy-1.0/reward_mean": pytest.approx(2 / 3),
        "eval/easy-1.0/response_tokens_mean": 5.0,
        "eval/easy-1.0/truncated_frac": 0.0,
    }
    start = {f"{key}_start": value for key, value in found.items()}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(make_row(1) | found | start)
    assert found.items() <= log.rows()[0].items() and start.items() <= log.rows()[0].items()


def test_parts_of_rewards_are_told_of_each_set_and_as_a_mean_over_sets(tmp_path):
    sets = {"a": graded((1.0, 0.0)), "b": graded((0.0,))}
    for sample, part in zip(sets["a"][0].samples, (1.0, 0.5), strict=True):
        sample.reward_parts = {"format": part}
    sets["b"][0].samples[0].reward_parts = {"format": 0.25}
    found = evaluation_metrics(sets, config())
    wanted = {"eval_reward/format": 0.5, "eval/a/reward/format": 0.75, "eval/b/reward/format": 0.25}
    assert {key: value for key, value in found.items() if "reward/" in key} == wanted
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(make_row(1) | found | {f"{key}_start": value for key, value in found.items()})
    assert wanted.items() <= log.rows()[0].items()


def test_sets_that_are_answered_once_have_no_share_in_pass_at_k():
    own = ("data.eval={a: a.jsonl, b: b.jsonl, c: c.jsonl}", "eval.samples={a: 2, c: 4}", "eval.temperature=1.0")
    sets = {"a": graded((1.0, 0.0), (0.0, 0.0)), "b": graded((1.0,)), "c": graded((0.0, 0.0, 0.0, 1.0))}
    found = evaluation_metrics(sets, config(*own))
    assert found["eval_pass_at_k"] == 0.75 and found["eval_accuracy"] == 0.5
    assert found["eval/a/pass_at_k"] == 0.5 and found["eval/c/pass_at_k"] == 1.0 and "eval/b/pass_at_k" not in found


def test_the_first_problems_of_every_set_are_asked_once_under_names_that_are_theirs_alone():
    sets = [("", [Problem("1", "a?", "", [1])]), ("b", [Problem("1", "b?", "", [2]), Problem("2", "b?", "", [3])])]
    held_out = HeldOut.of(sets, 1)
    assert [(problem.id, problem.prompt) for problem in held_out.problems] == [("1", "a?"), ("b/1", "b?")]
    assert sets[1][1][0].id == "1"


def test_an_evaluation_samples_as_its_own_settings_say_and_gives_the_groups_of_each_set(one_rank):
    asked = []

    class Engine:
        def generate(self, problems, sampling, must_stop):
            asked.append((len(problems), sampling))
            return [[Sample(0, [7], [-1.0], "stop", 0), Sample(1, [8], [-1.0], "stop", 0)] for _ in problems]

    sets = [
        ("a", [Problem("1", "a?", "", [1], {"truth": "7"})]),
        ("b", [Problem("1", "b?", "", [2], {"truth": "8"}), Problem("2", "c?", "", [3], {"truth": "9"})]),
    ]
    own = ("eval.samples=2", "eval.temperature=0.6", "eval.top_p=0.95", "eval.top_k=20", "eval.max_response_tokens=77")
    found = evaluate(
        Engine(),
        HeldOut.of(sets, 5),
        config(*own, "run.seed=3", "rollout.temperature=1.0", "rollout.top_p=0.5"),
        decode=lambda ids: str(ids[0]),
        grader=lambda requests: [Grade(float(one.response == one.extra["truth"]), "ok", "") for one in requests],
        must_stop=lambda: None,
        with_servers=lambda draw: draw(),
    )
    ((count, sampling),) = asked
    assert count == 3
    assert (sampling.samples[0], sampling.temperature, sampling.top_p, sampling.top_k) == (2, 0.6, 0.95, 20)
    assert (sampling.max_tokens, sampling.seed, sampling.step, sampling.routing) == (77, 3, -1, False)
    rewards = {name: [[sample.reward for sample in group.samples] for group in groups] for name, groups in found.items()}
    assert rewards == {"a": [[1.0, 0.0]], "b": [[0.0, 1.0], [0.0, 0.0]]}


def test_each_set_is_answered_as_often_as_its_samples_say(one_rank):
    asked = []

    class Engine:
        def generate(self, problems, sampling, must_stop):
            asked.append(dict(zip([one.id for one in problems], sampling.samples_of(problems), strict=True)))
            return [[Sample(i, [7], [-1.0], "stop", 0) for i in range(count)] for count in sampling.samples_of(problems)]

    sets = [("a", [Problem("1", "a?", "", [1])]), ("b", [Problem("1", "b?", "", [2]), Problem("2", "c?", "", [3])])]
    found = evaluate(
        Engine(),
        HeldOut.of(sets, 5),
        config("data.eval={a: a.jsonl, b: b.jsonl}", "eval.samples={b: 3}", "eval.temperature=0.6"),
        decode=str,
        grader=lambda requests: [Grade(0.0, "ok", "")] * len(requests),
        must_stop=lambda: None,
        with_servers=lambda draw: draw(),
    )
    assert asked == [{"a/1": 1, "b/1": 3, "b/2": 3}]
    assert {name: [len(group.samples) for group in groups] for name, groups in found.items()} == {"a": [1], "b": [3, 3]}


def test_an_evaluation_is_limited_as_the_rollouts_are_where_it_has_no_limit_of_its_own(one_rank):
    asked = []

    class Engine:
        def generate(self, problems, sampling, must_stop):
            asked.append(sampling.max_tokens)
            return [[Sample(0, [7], [-1.0], "stop", 0)] for _ in problems]

    evaluate(
        Engine(),
        HeldOut.of([("", [Problem("1", "a?", "7", [1])])], 5),
        config("rollout.max_response_tokens=31"),
        decode=str,
        grader=lambda requests: [Grade(0.0, "ok", "")] * len(requests),
        must_stop=lambda: None,
        with_servers=lambda draw: draw(),
    )
    assert asked == [31]


def test_the_best_steps_have_the_highest_metric_then_the_highest_reward_and_are_the_latest():
    rows = [
        {"step": 1, "eval_accuracy": 0.5, "eval_reward_mean": 0.4, "eval/a/accuracy": 0.9},
        {"step": 2, "eval_accuracy": 0.75, "eval_reward_mean": 0.3},
        {"step": 3},  # not evaluated
        {"step": 4, "eval_accuracy": 0.75, "eval_reward_mean": 0.3, "eval/a/accuracy": 0.1},
        {"step": 5, "eval_accuracy": 0.5, "eval_reward_mean": 0.6},
        {"step": 6, "eval_accuracy": None},
    ]
    assert best_steps(rows, "eval_accuracy") == [4, 2, 5, 1]
    assert best_steps(rows, "eval/a/accuracy") == [1, 4]
    assert best_steps(rows, "eval_pass_at_k") == []
