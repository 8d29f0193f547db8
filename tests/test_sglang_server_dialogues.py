"""Dialogues with a real SGLang server on CPU (see tests/test_sglang_server.py): whose weights every token was drawn from."""

from __future__ import annotations

import pytest

from tests.sglang_dialogue_jobs import reply, tokens_of, words
from tests.test_sglang_server import PROMPTS, model, pytestmark, server  # noqa: F401

STOP_IDS = range(100, 150)
"""A sixth of the vocabulary, so that turns have about six tokens."""
SIZES = dict(prompts_per_step=2, max_response_tokens=64)


def check_dialogue(group: dict, one: dict, limit: int = 64) -> int:
    """Turns end with stop tokens, and the replies between them are those of the environment; returns the number of turns."""
    number, ids = int(group["problem"]["answer"]), one["response_ids"].tolist()
    mask = one["loss_mask"].tolist() or [1] * len(ids)
    assert len(mask) == len(ids) == len(one["rollout_logprobs"]) <= limit
    place, turn = 0, 0
    for message in one["messages"]:
        if message["role"] == "assistant":
            turn += 1
            end = next((at + 1 for at in range(place, len(ids)) if ids[at] in STOP_IDS), len(ids))
        else:
            end = place + len(tokens_of(number, turn))
            assert ids[place:end] == tokens_of(number, turn)
        assert message["content"] == words(ids[place:end])
        assert mask[place:end] == [int(message["role"] == "assistant")] * (end - place)
        place = end
    assert place == len(ids) and one["messages"][-1]["role"] == "assistant"
    is_over = ids[-1] in STOP_IDS
    if one["finish_reason"] == "stop":
        assert is_over and turn == 1 + number % 3
    else:
        assert not is_over or turn == 3 or len(ids) + len(tokens_of(number, turn)) >= limit
    return turn


@pytest.mark.parametrize(
    "rollout", [dict(max_staleness=1), dict(max_staleness=1, partial=True, max_oversample=2.0)], ids=["ahead", "partial"]
)
def test_every_drawn_token_of_a_dialogue_has_the_log_prob_of_the_weights_that_it_names(
    gangs, model, server, tmp_path, rollout  # noqa: F811
):  # fmt: skip
    job = dict(model=model, directory=str(tmp_path), prompts=PROMPTS, urls=(server.url,), stop_ids=STOP_IDS)
    (found,) = gangs(1).run(
        "tests.sglang_dialogue_jobs:streamed_dialogues", deadline_s=900.0, steps=5, rollout=rollout | SIZES, **job
    )
    groups = [group for _, step, _ in found["steps"] for group in step]
    assert len({group["id"] for group in groups}) == 10 and len(found["evaluated"]) == 3
    turns = {check_dialogue(group, one) for group in [*groups, *found["evaluated"]] for one in group["samples"]}
    assert turns == {1, 2, 3}
    assert max(found["gaps"]) < 1e-5 and min(found["wrong"]) > 1e-3
    assert max(counts["staleness_max"] for _, _, counts in found["steps"]) == 1
    samples = [one for group in groups for one in group["samples"]]
    versions = [one["weight_versions"] for one in samples if one["weight_versions"]]
    assert all(list(each) == sorted(each) for each in versions)
    for group in found["evaluated"]:
        assert all(one["weight_version"] == 4 and not one["weight_versions"] for one in group["samples"])
    assert reply([{"role": "assistant", "content": ""}], "0", {}) is None
