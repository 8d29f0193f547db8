"""Recorded steps, their view and the rollouts for people to read, with replies between the model's turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from etr_megatron.config import load_config
from etr_megatron.data import build_tiny_policy
from etr_megatron.errors import UserError
from etr_megatron.observe.report import summary
from etr_megatron.observe.rollout_view import listing, view
from etr_megatron.observe.rollouts import rollouts_path, save_rollouts
from etr_megatron.rollout.record import group_from_json, group_to_json, read_record, record_path, write_record
from etr_megatron.types import Group, Problem, Sample
from tests.test_observe import make_row
from tests.test_rollout_records import group

SAID = [
    {"role": role, "content": content}
    for role, content in (("assistant", "look it up"), ("tool", "6 x 7 = 42 €"), ("assistant", "42"))
]


def conversation() -> Group:
    samples = [
        Sample(
            *(0, [5, 6, 70, 71, 7], [-0.5, -0.25, 0.0, 0.0, -1.0], "stop", 4, "look it up 6 x 7 = 42 € 42", 1.0, "ok"),
            loss_mask=[1, 1, 0, 0, 1],
            messages=SAID,
            environment_status="ok",
        ),
        Sample(1, [5], [-0.5], "stop", 4, "?", 0.0, "ok", messages=SAID[2:], environment_status="timeout"),
    ]
    problem = Problem("a", "6 times 7?", "42", [1, 2], messages=[{"role": "user", "content": "6 times 7?"}])
    return Group("a@5", problem, samples)


def test_a_recorded_step_with_replies_comes_back_exactly(tmp_path):
    write_record(tmp_path, 5, [conversation(), group("b")], {}, [[-0.5, -0.5, -1.5], [-0.75], [-1.0, -1.0, -1.0], [-1.0]])
    found, _ = read_record(tmp_path, 5)
    assert [group_from_json(one) for one in found] == [conversation(), group("b")]
    old = [sample["old_logprobs"] for one in found for sample in one["samples"]]
    assert old == [[-0.5, -0.5, None, None, -1.5], [-0.75], [-1.0, -1.0, -1.0], [-1.0]]


AS_EVER = (
    '{"step": 5, "counts": {}}\n'
    '{"id": "a@5", "problem": {"id": "a", "prompt": "6 times 7?", "answer": "42", "prompt_ids": [1, 2], "extra": {}}, '
    '"samples": ['
    '{"index": 0, "response_ids": [5, 6, 7], "rollout_logprobs": [-0.1, -0.3333333333333333, -2e-09], "finish_reason": "stop", '
    '"weight_version": 4, "text": "x €", "reward": 1.0, "reward_status": "ok", "weight_versions": [3, 4, 4], "routing": "", '
    '"reward_parts": {"format": 0.5}, "old_logprobs": [-0.25, -0.5, 0.0]}, '
    '{"index": 1, "response_ids": [8], "rollout_logprobs": [-0.25], "finish_reason": "length", "weight_version": 4, "text": '
    '"y", "reward": 0.0, "reward_status": "timeout", "weight_versions": [], "routing": "AP8RAw==", "reward_parts": {}, '
    '"old_logprobs": [-0.5]}]}\n'
)
"""The file that was written before there were environments."""


def test_a_record_without_an_environment_is_byte_for_byte_what_it_was(tmp_path):
    write_record(tmp_path, 5, [group()], {}, [[-0.25, -0.5, 0.0], [-0.5]])
    assert (tmp_path / "step_000005.jsonl").read_text(encoding="utf-8") == AS_EVER


def with_values(added: str = "", value: Any = None, **changes: Any) -> str:
    """A recorded step with other values in its first sample or its problem. added: a key of that sample besides."""
    one = group_to_json(conversation())
    for place in (one["problem"], one["samples"][0]):
        place.update({key: changes[key] for key in changes.keys() & place.keys()})
    one["samples"][0] |= {added: value} if added else {}
    return '{"step": 1, "counts": {}}\n' + json.dumps(one) + "\n"


NOT_NULL = "`old_logprobs` is not null exactly where `loss_mask` is 0"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (with_values(loss_mask=[1, 1, 0, 0]), "`loss_mask` has 4 values for 5 tokens"),
        (with_values(loss_mask=[1, 1, 0, 0, 2]), "`loss_mask` has values other than 0 and 1"),
        (with_values(loss_mask=[1, 1, 0, 0, -1]), "`loss_mask` is not a list of numbers"),
        (with_values(loss_mask="11001"), "`loss_mask` is not a list of numbers"),
        (with_values(environment_status=1), "`environment_status` of a sample is not a text"),
        (with_values(messages={}), "`messages` of a problem is not a list of objects"),
        (with_values("messages", [{"role": "user", "content": None}]), "`messages` of a sample is not a list of objects"),
        (with_values("messages", [{"content": "7"}]), "`messages` of a sample is not a list of objects"),
        (with_values("messages", ["7"]), "`messages` of a sample is not a list of objects"),
        (with_values("old_logprobs", [-0.5, -0.5, 0.0, None, -1.5]), NOT_NULL),
        (with_values("old_logprobs", [-0.5, None, None, None, -1.5]), NOT_NULL),
        (with_values("old_logprobs", [-0.5, -0.5, None, None]), "`old_logprobs`"),
        (with_values("old_logprobs", ["", -0.5, None, None, -1.5]), "`old_logprobs` is not a list of numbers"),
    ],
)
def test_a_damaged_record_is_one_sentence(tmp_path, text, why):
    (tmp_path / "step_000001.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        read_record(tmp_path, 1)
    assert f"is not a recorded step (line 2: {why}" in str(error.value) and "\n" not in str(error.value)


SHOWN = """\
sample        a@5/0
reward        1 (ok)
finish        stop, 5 tokens (2 of replies)
environment   ok
log-prob gap  mean 2.5e-01, largest 5.0e-01 at token 4
answer        42
prompt
    6 times 7?
assistant
    look it up
tool
    6 x 7 = 42 €
assistant
    42

token       id  text    weights     engine    trainer        gap
    0        5  '<5>'         4    -0.5000    -0.5000    0.0e+00
    1        6  '<6>'         4    -0.2500    -0.5000    2.5e-01
    2       70  '<70>'    reply
    3       71  '<71>'    reply
    4        7  '<7>'         4    -1.0000    -1.5000    5.0e-01"""


def test_the_view_of_a_rollout_tells_replies_from_what_the_model_drew(tmp_path):
    recorded = tmp_path / "recorded"
    write_record(recorded, 5, [conversation()], {}, [[-0.5, -0.5, -1.5], [-0.5]])
    lines = listing(tmp_path, 5).splitlines()
    assert lines == ["a@5/0  reward 1, 5 tokens (2 of replies), stop", "a@5/1  reward 0, 1 tokens, stop"]
    assert view(tmp_path, 5, "a@5/0", lambda ids: [f"<{token}>" for token in ids]) == SHOWN
    write_record(recorded, 6, [conversation()], {}, None)
    lines = view(tmp_path, 6, "a@5/0", "its tokenizer is gone").splitlines()
    assert "log-prob gap  the trainer's log-probs were not recorded" in lines
    assert lines[-2:] == ["    3       71          reply", "    4        7              4    -1.0000"]


def test_rollouts_to_read_have_turns_replies_and_messages(tmp_path):
    save_rollouts(tmp_path, 5, [conversation(), group()])
    first, second, *plain = map(json.loads, rollouts_path(tmp_path, 5).read_text(encoding="utf-8").splitlines())
    assert (first["turns"], first["reply_tokens"], first["tokens"], first["messages"]) == (2, 2, 5, SAID)
    assert first["mean_logprob"] == pytest.approx(-1.75 / 3) and first["environment"] == "ok"
    assert (second["turns"], second["reply_tokens"], second["environment"]) == (1, 0, "timeout")
    for one in plain:
        assert not {"turns", "reply_tokens", "messages", "environment"} & one.keys()


def test_the_summary_of_a_run_tells_of_calls_of_the_environment_that_failed():
    rows = [
        make_row(1, environment_errors=2, environment_timeouts=0),
        make_row(2, environment_errors=1, environment_timeouts=1),
    ]
    assert summary(rows).splitlines()[-1] == "environment       3 errors, 1 timeout"
    for quiet in ({}, {"environment_errors": 0, "environment_timeouts": 0}):
        assert "environment" not in summary([make_row(1, **quiet)])


def put_replies_in(recorded: Path, step: int) -> list[list[int]]:
    """Insert three tokens before the second of every response of a recorded step; returns the prompts of the samples."""
    path = record_path(recorded, step)
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    for sample in (sample for line in lines for sample in line["samples"]):
        rest = len(sample["response_ids"]) - 1
        for name, values in (("response_ids", [9, 8, 7]), ("rollout_logprobs", [0.0, 0.0, 0.0])):
            sample[name][1:1] = values
        sample["loss_mask"] = [1, 0, 0, 0, *[1] * rest]
        del sample["old_logprobs"]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)), encoding="utf-8")
    return [line["problem"]["prompt_ids"] for line in lines for _ in line["samples"]]


@pytest.mark.slow
def test_a_run_trains_on_what_the_model_drew_in_the_context_of_replies(runs):
    options = ("eval.every=0", "checkpoint.every=0", "run.steps=2", "rollout.record=true")
    code, printed = runs.finish("run.name=first", "parallel.tp=1", *options)
    assert code == 0, printed
    prompts, _ = (put_replies_in(runs.directory("first") / "recorded", step) for step in (1, 2))
    replay = (f"rollout.replay={runs.directory('first')}", "--nproc", "2", "parallel.tp=1", "parallel.cp=2")
    code, printed = runs.finish("run.name=second", *replay, *options)
    assert code == 0, printed
    config = load_config(runs.config, runs.command()[4:])
    tiny = AutoModelForCausalLM.from_pretrained(build_tiny_policy(config.tiny, config.arithmetic, progress=False))
    written = [sample for one in read_record(runs.directory("second") / "recorded", 1)[0] for sample in one["samples"]]
    gaps = []
    for prompt, one in zip(prompts, written, strict=True):
        response, mask = one["response_ids"], one["loss_mask"]
        with torch.no_grad():
            log_p = tiny(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        wanted = log_p.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
        for old, own, engine, is_drawn in zip(one["old_logprobs"], wanted, one["rollout_logprobs"], mask, strict=True):
            assert old == pytest.approx(own, abs=1e-4) if is_drawn else old is None
            gaps += [abs(own - engine)] if is_drawn else []
    first, second = runs.rows("second")
    assert first["logprob_gap_mean"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-3) and second["grad_norm"] > 0
    assert first["response_tokens_mean"] == pytest.approx(len(gaps) / len(written) + 3)
