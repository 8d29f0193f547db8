"""Whole runs with an environment whose dialogues go on during training, against simulated servers (tests/fake_sglang.py)."""

from __future__ import annotations

import pytest

from tests.runs import HELD
from tests.test_rollout_async import groups_of, options
from tests.test_sglang_gone import server

pytestmark = pytest.mark.slow

LIMIT, LAST = 110, 23
DIALOGUES = (
    "environment.function=tests.dialogue_functions:by_answer",
    "environment.workers=2",
    "rollout.stop_strings=['5']",  # token 23
    f"rollout.max_response_tokens={LIMIT}",
)


def assert_dialogues(steps: list[tuple[int, list]], most: int) -> set[int]:
    """No group repeats, every response is a whole dialogue of unbroken chains of tokens, no token is older than `most`. Returns
    the numbers of turns."""
    ids, turns = set(), set()
    for step, groups in steps:
        assert len(groups) == 6
        for group in groups:
            assert group.id not in ids and len(group.samples) == 4
            ids.add(group.id)
            count = 1 + int(group.problem.answer) % 3
            for sample in group.samples:
                said = [message["content"] for message in sample.messages if message["role"] == "user"]
                assert said == [f"More {turn}." for turn in range(1, count)] and sample.turns == count
                assert sample.finish_reason == "stop" and sample.environment_status == "ok"
                before = group.problem.prompt_ids[-1]
                mask = sample.loss_mask or [1] * len(sample.response_ids)
                for token, is_drawn, logprob in zip(sample.response_ids, mask, sample.rollout_logprobs, strict=True):
                    if is_drawn:
                        assert token == (before + 1) % 97 and logprob == -0.5
                    else:
                        assert logprob == 0
                    before = token
                assert sample.num_generated == count * (sample.response_ids.index(LAST) + 1) and before == LAST
                versions = sample.token_versions().tolist()
                assert versions == sorted(versions) and 0 <= step - 1 - versions[-1] <= step - 1 - versions[0] <= most
            turns.add(count)
    return turns


def test_dialogues_killed_and_resumed_lose_no_turn_and_repeat_nothing(runs):
    partial = ("rollout.partial=true", "rollout.max_staleness=4", "rollout.max_oversample=1.5", *DIALOGUES)
    with server(tokens_per_s=400, odd_pause_at=8) as url:  # prompts of one kind have no response that was not cut off once
        process = runs.held("step 3", *options("killed", url, *partial))
        process.kill()
        process.communicate()
        saved = runs.saved_rows("killed")
        code, printed = runs.finish(*options("killed", url, HELD, *partial))
    assert code == 0, printed
    runs.assert_went_on("killed", saved)
    steps = groups_of(runs, "killed")
    assert assert_dialogues(steps, 4) == {1, 2, 3}
    rows = runs.rows("killed")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and sum(row["samples_continued"] for row in rows) > 0
    assert all(row["environment_errors"] == row["environment_timeouts"] == 0 for row in rows)
    assert any(1 < row["turns_mean"] < 3 for row in rows)


def test_a_run_whose_environment_fails_is_saved_and_goes_on_when_it_is_mended(runs):
    """Every step is saved; so the checkpoint that the failing run leaves was written before it noticed."""
    ahead = ("rollout.max_staleness=1", *DIALOGUES)
    with server(tokens_per_s=400) as url:
        process = runs.held("step 2", *options("mended", url, *ahead))
        process.kill()
        process.communicate()
        broken = "environment.function=tests.dialogue_functions:always_fails"
        code, printed = runs.finish(*options("mended", url, HELD, *ahead, broken))
        assert code == 2 and "calls of environment.function failed" in printed and "Traceback" not in printed, printed
        done = len(runs.rows("mended"))
        assert done < 6
        code, printed = runs.finish(*options("mended", url, HELD, *ahead))
    assert code == 0, printed
    assert [row["step"] for row in runs.rows("mended")] == [1, 2, 3, 4, 5, 6]
    assert assert_dialogues(groups_of(runs, "mended"), 1) == {1, 2, 3}


def test_a_run_with_responses_that_wait_for_a_reply_needs_its_environment(runs):
    ahead = ("rollout.partial=true", "rollout.max_staleness=4", "rollout.max_oversample=2", *DIALOGUES)
    slow = ("environment.function=tests.dialogue_functions:never_answers_some", "environment.timeout_s=3600")
    with server(tokens_per_s=400) as url:
        process = runs.held("step 2", *options("waits", url, *ahead, *slow))
        process.kill()
        process.communicate()
        without = (option for option in ahead if not option.startswith("environment."))
        code, printed = runs.finish(*options("waits", url, HELD, *without, ranks=2))
        assert code == 2 and "Traceback" not in printed, printed
        assert "responses that wait for a reply of an environment; set environment.function to that of the run" in printed
        code, printed = runs.finish(*options("waits", url, HELD, *ahead))
    assert code == 0, printed
    assert assert_dialogues(groups_of(runs, "waits"), 4) == {1, 2, 3}
