"""Runs with an environment through the launcher: what they leave behind, records and replay, kills and resumes."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.runs import Runs
from tests.test_run import without_evaluation

pytestmark = pytest.mark.slow

DIALOGUES = (
    "environment.function=tests.dialogue_functions:again",
    "reward.function=tests.dialogue_functions:turns_are_even",
    "rollout.max_response_tokens=60",
    "eval.temperature=1",
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, _tiny_cache):
    """A run of two ranks without interruptions, recorded."""
    runs = Runs(tmp_path_factory.mktemp("dialogues"), _tiny_cache)
    code, printed = runs.finish("run.name=straight", "rollout.record=true", *DIALOGUES)
    assert code == 0, printed
    return runs


def test_a_run_trains_on_dialogues_and_tells_their_turns(straight):
    rows = straight.rows("straight")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["logprob_gap_max"] < 1e-4 and row["environment_errors"] == 0 for row in rows)
    assert all(1 < row["turns_mean"] < 3 and row["turns_mean"] == row["reward/turns"] for row in rows)
    assert all(0 < row["reply_tokens_mean"] < row["response_tokens_mean"] for row in rows)
    assert rows[2]["eval_turns_mean"] > 1
    assert len({row["loss"] for row in rows}) == 6


def test_a_record_replays_dialogues_bit_for_bit(straight):
    source = straight.directory("straight")
    code, printed = straight.finish("run.name=replayed", f"rollout.replay={source}", "eval.every=0", *DIALOGUES)
    assert code == 0, printed
    assert without_evaluation(straight.rows("replayed")) == without_evaluation(straight.rows("straight"))
    lines = (source / "recorded" / "step_000002.jsonl").read_text().splitlines()[1:]
    samples = [sample for line in lines for sample in json.loads(line)["samples"]]
    long = next(sample for sample in samples if len(sample.get("messages", ())) == 3)
    assert [message["role"] for message in long["messages"]] == ["assistant", "user", "assistant"]
    assert len(long["loss_mask"]) == len(long["response_ids"]) == len(long["old_logprobs"])


def test_a_run_resumes_its_dialogues_bit_for_bit(straight):
    shutil.copytree(straight.directory("straight"), straight.directory("resumed"))
    shutil.rmtree(straight.directory("resumed") / "checkpoints" / "step_000006")
    saved = straight.saved_rows("resumed")
    code, printed = straight.finish("run.name=resumed", *DIALOGUES)
    assert code == 0, printed
    straight.assert_went_on("resumed", saved)
    assert straight.rows("resumed") == straight.rows("straight")


def test_an_environment_that_always_fails_ends_the_run_with_one_sentence(straight):
    broken = ("eval.every=0", "parallel.tp=1", "environment.function=tests.dialogue_functions:always_fails")
    code, printed = straight.finish("run.name=failed", *DIALOGUES, *broken)
    assert code == 2 and "calls of environment.function failed, which ended their responses; the first: " in printed
    assert "raised KeyError: 'tool'" in printed and "Traceback" not in printed
