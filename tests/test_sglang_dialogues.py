"""Responses of several turns from servers, with an environment in processes of its own."""

from __future__ import annotations

import pytest

from tests.dialogue_functions import tokens_of, words
from tests.fake_servers import servers
from tests.test_sglang_engine import OWN

STEPS, PER_STEP, TOKENS = 5, 3, 60


def expected(number: int, prompt: list[int], limit: int = TOKENS) -> tuple[list[int], list[int], list[dict], str]:
    """Tokens, loss mask, messages and finish reason of a response of a fake server, which counts on to the next stop string."""
    ids: list[int] = []
    mask: list[int] = []
    messages: list[dict] = []
    for turn in range(1, 4):
        drawn: list[int] = []
        last = [*prompt, *ids][-1]
        while len(ids) + len(drawn) < limit and (not drawn or drawn[-1] not in (10, 20, 30, 40)):
            drawn.append((last + 1 + len(drawn)) % 97)
        ids, mask = ids + drawn, mask + [1] * len(drawn)
        messages.append({"role": "assistant", "content": words(drawn)})
        if drawn[-1] not in (10, 20, 30, 40):
            return ids, mask, messages, "length"
        if turn > number % 3:
            break
        reply = tokens_of(number, turn)
        if turn == 3 or len(ids) + len(reply) >= limit:
            return ids, mask, messages, "length"
        ids, mask = ids + reply, mask + [0] * len(reply)
        messages.append({"role": "user", "content": words(reply)})
    return ids, mask, messages, "stop"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rollout"),
    [("die_in", {"partial": True, "max_staleness": 1}), ("stop_in", {"max_staleness": 1})],
    ids=["dies, partial rollouts one step ahead", "hangs, one step ahead"],
)
def test_a_server_that_is_lost_costs_no_turn_and_no_reply(gangs, hf_models, tmp_path, how, rollout):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), how=how, steps=STEPS, hang_timeout_s=3.0, **OWN)
    sizes = dict(prompts_per_step=PER_STEP, max_response_tokens=TOKENS)
    found, other = gangs(2).run("tests.sglang_dialogue_jobs:lost_in_dialogues", rollout=rollout | sizes, trains_s=0.5, **job)
    assert any("SGLang server 0" in failed for failed in found["failed"])
    groups = [group for _, step, _ in found["steps"] for group in step]
    there = [group for _, step, _ in other["steps"] for group in step]
    for group, elsewhere in zip(groups, there, strict=True):
        for one, same in zip(group["samples"], elsewhere["samples"], strict=True):
            assert same == one | {"text": "", "messages": []}  # only rank 0 has these
    assert len({group["id"] for group in groups}) == STEPS * PER_STEP
    turns = set()
    for version, step, counts in found["steps"]:
        assert len(step) == PER_STEP and counts.get("staleness_max", 0) <= 1
        for group in step:
            wanted = expected(int(group["problem"]["answer"]), group["problem"]["prompt_ids"])
            for one in group["samples"]:
                mask = one["loss_mask"].tolist() or [1] * len(one["response_ids"])
                assert (one["response_ids"].tolist(), mask, one["messages"], one["finish_reason"]) == wanted
                assert one["rollout_logprobs"].tolist() == [-0.5 * is_drawn for is_drawn in mask]
                versions = one["weight_versions"].tolist() or [one["weight_version"]]
                assert versions == sorted(versions) and version - versions[0] <= rollout.get("max_staleness", 0)
                assert one["environment_status"] == "ok" or one["finish_reason"] == "length"
                turns.add(sum(message["role"] == "assistant" for message in one["messages"]))
    assert turns == {1, 2, 3}


def test_the_turns_of_an_evaluation_are_drawn_at_the_same_servers_and_attention_groups(gangs, hf_models, tmp_path):
    with servers({"says": {"/server_info": {"dp_size": 2}}}, {}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), urls=urls, sync="disk")
        (found,) = gangs(1).run("tests.sglang_dialogue_jobs:two_rounds", **job)
    first, second = (sorted(prompts) for prompts in found)
    assert first == [([0, 7], 0), ([2, 7], 1), ([2, 7, 9], 1), ([4, 7], 0), ([4, 7, 9], 0)]
    assert second == [([1, 7], None), ([1, 7, 9], None), ([3, 7], None)]
