"""Whole runs with generation during training, against processes that speak SGLang's protocol (tests/fake_sglang.py)."""

from __future__ import annotations

import pytest

from etr_megatron.rollout.record import group_from_json, read_record
from tests.runs import HELD
from tests.test_sglang_gone import server

pytestmark = pytest.mark.slow


def options(name: str, url: str, *more: str, ranks: int = 1) -> list[str]:
    """ranks: only rank 0 communicates with servers, and each rank takes seconds to start."""
    return [
        f"run.name={name}",
        f"parallel.tp={ranks}",
        "run.steps=6",
        "checkpoint.every=1",
        "eval.every=0",
        "rollout.backend=sglang",
        "rollout.max_logprob_gap=100",  # the servers' log-probs are made up
        "rollout.record=true",
        f"sglang.urls=[{url}]",
        "sglang.update_timeout_s=120",
        "sglang.probe_every=0",
        *more,
    ]


def groups_of(runs, name: str) -> list[tuple[int, list]]:
    folder = runs.directory(name) / "recorded"
    return [(step, [group_from_json(one) for one in read_record(folder, step)[0]]) for step in range(1, 7)]


def assert_whole(steps: list[tuple[int, list]], most: int) -> set[int]:
    """No group repeats, every response is an unbroken chain of 24 tokens, no token is older than `most`. Returns the ages."""
    ids, ages = set(), set()
    for step, groups in steps:
        assert len(groups) == 6
        for group in groups:
            assert group.id not in ids and len(group.samples) == 4
            ids.add(group.id)
            for sample in group.samples:
                last = group.problem.prompt_ids[-1]
                assert sample.response_ids.tolist() == [(last + 1 + i) % 97 for i in range(24)]
                assert len(sample.rollout_logprobs) == 24 and sample.finish_reason == "length"
                ages |= {step - 1 - version for version in sample.token_versions()}
    assert max(ages) <= most and min(ages) >= 0
    return ages


def test_one_step_off_every_step_but_the_first_was_generated_while_another_trained(runs):
    with server(tokens_per_s=200) as url:
        code, printed = runs.finish(*options("ahead", url, "rollout.max_staleness=1"))
    assert code == 0, printed
    steps = groups_of(runs, "ahead")
    assert_whole(steps, 1)
    rows = runs.rows("ahead")
    assert [row["staleness_max"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert all(group.id.endswith(f"@{step}") for step, groups in steps for group in groups)


def test_partial_rollouts_killed_and_resumed_lose_nothing_and_repeat_nothing(runs):
    partial = ("rollout.partial=true", "rollout.max_staleness=4", "rollout.max_oversample=1.5")
    with server(tokens_per_s=200, odd_pause_at=8) as url:  # prompts of one kind have no response that was not cut off once
        process = runs.held("step 3", *options("killed", url, *partial, ranks=2))
        process.kill()
        process.communicate()
        saved = runs.saved_rows("killed")
        code, printed = runs.finish(*options("killed", url, HELD, *partial, ranks=2))
    assert code == 0, printed
    runs.assert_went_on("killed", saved)
    steps = groups_of(runs, "killed")
    ages = assert_whole(steps, 4)
    assert len(ages) > 1
    rows = runs.rows("killed")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert sum(row["samples_continued"] for row in rows) > 0
    continued = [sample for _, groups in steps for group in groups for sample in group.samples if sample.weight_versions]
    assert len(continued) == sum(row["samples_continued"] for row in rows)
