"""Dialogues with a real SGLang server on CPU (see tests/test_sglang_server.py): whose weights every token was drawn from."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from etr_megatron.config import SglangConfig
from tests.dialogue_functions import by_number, tokens_of, words
from tests.test_rollout import as_sets, experts_chosen
from tests.test_sglang_server import OWN, PROMPTS, model, pytestmark, server, started  # noqa: F401

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
    # Whether a sync comes in the middle of any depends on the machine.
    mixed = [one for group in groups for one in group["samples"] if one["weight_versions"]]
    assert all(list(one["weight_versions"]) == sorted(one["weight_versions"]) for one in mixed)
    for group in found["evaluated"]:
        assert all(one["weight_version"] == 4 and not one["weight_versions"] for one in group["samples"])
    assert by_number([{"role": "assistant", "content": ""}], "0", {}) is None


def test_the_experts_of_a_dialogue_cover_the_prompt_all_turns_and_the_replies(gangs, tmp_path):
    path = str(tmp_path / "qwen3_moe")
    torch.manual_seed(3)
    sizes = dict(vocab_size=301, hidden_size=48, head_dim=8, num_hidden_layers=2, max_position_embeddings=512)
    heads = dict(num_attention_heads=8, num_key_value_heads=4, initializer_range=0.1, tie_word_embeddings=False)
    experts = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=128, norm_topk_prob=True)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)).float().save_pretrained(path)
    rollout = dict(max_staleness=1, **SIZES)
    with started(SglangConfig(**OWN, sync="broadcast"), path, tmp_path, routing=True) as process:
        job = dict(model=path, directory=str(tmp_path), prompts=PROMPTS, urls=(process.url,), stop_ids=STOP_IDS)
        (found,) = gangs(1).run(
            "tests.sglang_dialogue_jobs:streamed_dialogues", deadline_s=900.0, steps=3, routing=True, rollout=rollout, **job
        )
    turns = set()
    for _, step, _ in found["steps"]:
        for group in step:
            for one in group["samples"]:
                tokens = [*group["problem"]["prompt_ids"], *one["response_ids"]]
                chosen = as_sets(one["routing"], layers=2, per_token=3)
                assert len(chosen) == len(tokens) - 1
                if one["weight_version"] == 0:
                    assert chosen == experts_chosen(path, tokens)[:-1]
                    turns.add(check_dialogue(group, one))
    assert len(turns) > 1
