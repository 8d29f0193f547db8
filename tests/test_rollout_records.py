"""Steps from disk: a recorded run is trained again without an engine, or inspected; rollouts without training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from array import array
from contextlib import nullcontext

import pytest
import torch.distributed as dist

from etr_megatron.config import Config
from etr_megatron.config.schema import RolloutConfig, TrainConfig
from etr_megatron.errors import UserError
from etr_megatron.observe.__main__ import main
from etr_megatron.observe.rollout_view import listing, view
from etr_megatron.rollout import ReplaySampler
from etr_megatron.rollout.record import group_from_json, group_to_json, read_record, recorded_steps, write_record
from etr_megatron.types import Group, Problem, Sample
from tests.runs import HELD

SHORT = ("parallel.tp=1", "eval.every=0", "checkpoint.every=0", "run.steps=3")
"""On one rank: several record and replay in tests/test_dialogue_runs.py."""


def group(name: str = "a") -> Group:
    samples = [
        Sample(0, [5, 6, 7], [-0.1, -1 / 3, -2e-9], "stop", 4, "x €", 1.0, "ok", [3, 4, 4], reward_parts={"format": 0.5}),
        Sample(1, [8], [-0.25], "length", 4, "y", 0.0, "timeout", routing=array("B", [0, 255, 17, 3])),
    ]
    return Group(f"{name}@5", Problem(name, "6 times 7?", "42", [1, 2]), samples)


def test_a_recorded_step_comes_back_exactly(tmp_path):
    write_record(tmp_path / "recorded", 5, [group("a"), group("b")], {"groups_asked": 3}, [[-0.2, -0.3, 0.0], [-0.5]] * 2)
    found, counts = read_record(tmp_path / "recorded", 5)
    assert [group_from_json(one) for one in found] == [group("a"), group("b")]
    assert counts == {"groups_asked": 3}
    assert found[1]["samples"][0]["old_logprobs"] == [-0.2, -0.3, 0.0]


def test_a_step_is_never_in_memory_as_a_whole(tmp_path):
    samples = [Sample(0, [5] * 2000, [-1 / 3] * 2000, "stop", 4, "", 1.0, "ok")]
    groups = [Group(f"{name}@1", Problem(name, "", "", [1]), samples) for name in map(str, range(40))]
    tracemalloc.start()
    try:
        write_record(tmp_path / "recorded", 1, groups, {}, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.6 * (tmp_path / "recorded" / "step_000001.jsonl").stat().st_size  # all groups took 3 times the file


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r", "\r\n", "\n"], ids=ascii)
def test_texts_may_hold_any_line_break(tmp_path, odd):
    sample = Sample(0, [5], [-0.1], "stop", 4, f"an{odd}swer{odd}", 1.0, "ok")
    one = Group("a@1", Problem("a", f"6 times{odd}7?", f"4{odd}2", [1]), [sample])
    write_record(tmp_path / "recorded", 1, [one, one], {}, None)
    assert [group_from_json(found) for found in read_record(tmp_path / "recorded", 1)[0]] == [one, one]
    assert len(listing(tmp_path, 1).split("\n")) == 2


def test_a_record_is_utf_8_in_any_locale(tmp_path):
    write_record(tmp_path, 5, [group()], {}, None)
    script = (
        "import sys; from pathlib import Path; from etr_megatron.rollout.record import read_record; "
        "print(ascii(read_record(Path(sys.argv[1]), 5)[0][0]['samples'][0]['text']))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == ascii("x €"), done.stderr


def test_a_step_that_is_not_there_or_torn_is_one_sentence(tmp_path):
    with pytest.raises(
        UserError, match=r"has no recorded steps; give the directory of a run that was made with rollout\.record=true$"
    ):
        read_record(tmp_path, 1)
    write_record(tmp_path, 4, [group()], {}, None)
    with pytest.raises(UserError, match="has recorded steps 4 to 4, but not step 1"):
        read_record(tmp_path, 1)
    path = tmp_path / "step_000004.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match=r"step_000004\.jsonl is not a recorded step"):
        read_record(tmp_path, 4)


def test_files_that_are_no_steps_do_not_count(tmp_path):
    write_record(tmp_path, 4, [group()], {}, None)
    for name in ("step_000001 (copy).jsonl", "step_old.jsonl", "step_.jsonl", "step_2.jsonl", ".step_000003.jsonl.7.tmp"):
        (tmp_path / name).write_text("")
    assert recorded_steps(tmp_path) == [4]
    with pytest.raises(UserError, match="has recorded steps 4 to 4, but not step 2"):
        read_record(tmp_path, 2)


@pytest.fixture
def replayed(tmp_path):
    """Replays step 1 of the run in `tmp_path`, with settings of `rollout`."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def take(train=None, **settings):
        config = Config(rollout=RolloutConfig(replay=str(tmp_path), **settings), train=train or TrainConfig())
        return ReplaySampler(config, cursor=None).take(1, lambda _: nullcontext())

    yield take
    dist.destroy_process_group()


def test_a_replay_with_other_numbers_than_the_records_is_refused(tmp_path, replayed):
    write_record(tmp_path / "recorded", 1, [group("a"), group("b")], {"groups_asked": 3}, None)
    found = replayed(prompts_per_step=2, samples_per_prompt=2)
    assert found.groups == [group("a"), group("b")] and found.counts == {"groups_asked": 3}
    with pytest.raises(UserError, match=r"has 2 groups; set rollout\.prompts_per_step=2 to replay it$"):
        replayed(prompts_per_step=4, samples_per_prompt=2)
    with pytest.raises(UserError, match=r"has groups of 2 samples; set rollout\.samples_per_prompt=2 to replay it$"):
        replayed(prompts_per_step=2, samples_per_prompt=8)


def test_routing_is_only_replayed_from_records_that_have_it(tmp_path, replayed):
    asked = dict(train=TrainConfig(routing_replay=True), prompts_per_step=1, samples_per_prompt=2)
    write_record(tmp_path / "recorded", 1, [group()], {}, None)
    assert replayed(**asked).groups == [group()]
    without = group()
    without.samples[1].routing = array("B")
    write_record(tmp_path / "recorded", 1, [without], {}, None)
    with pytest.raises(UserError, match=r"not say which experts were chosen; set train\.routing_replay=false to replay it$"):
        replayed(**asked)
    assert replayed(**asked | {"train": TrainConfig()}).groups == [without]


def test_records_from_before_there_was_a_routing_are_read(tmp_path, replayed):
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "step_000001.jsonl").write_text(damaged(routing=None))
    (found,) = replayed(prompts_per_step=1, samples_per_prompt=2).groups
    assert found.samples[0] == group().samples[0]


def damaged(**changes) -> str:
    """A recorded step with other values in its first sample, its problem or its group; None removes one."""
    one = group_to_json(group())
    for place in (one, one["problem"], one["samples"][0]):
        place.update({key: changes[key] for key in changes.keys() & place.keys()})
        for key in [key for key in place if key in changes and changes[key] is None]:
            del place[key]
    return '{"step": 1, "counts": {}}\n' + json.dumps(one) + "\n"


DAMAGES = [
    ("", "it is empty"),
    ("\n", "it is empty"),
    ('{"step": 1, "counts": {}}\n', "it has no groups"),
    ("[1]\n" + damaged().split("\n")[1] + "\n", "line 1: the head is not a JSON object"),
    ('{"step": 1}\n' + damaged().split("\n")[1] + "\n", "line 1: `counts`"),
    ('{"step": 1, "counts": [1]}\n' + damaged().split("\n")[1] + "\n", "line 1: `counts`"),
    (damaged() + "7\n", "line 3: a group is not a JSON object"),
    (damaged() + "{\n", "line 3: not JSON"),
    (damaged(id=None), "line 2: `id`"),
    (damaged(problem=None), "line 2: `problem`"),
    (damaged(samples=None), "line 2: `samples`"),
    (damaged(samples=[]), "line 2: `samples`"),
    (damaged(samples=[3]), "line 2: a sample is not a JSON object"),
    (damaged(answer=None), "line 2: `answer`"),
    (damaged(prompt=7), "line 2: `prompt`"),
    (damaged(reward=None), "line 2: `reward`"),
    (damaged(reward="1"), "line 2: `reward`"),
    (damaged(response_ids=None), "line 2: `response_ids`"),
    (damaged(response_ids=["a", "b", "c"]), "line 2: `response_ids`"),
    (damaged(response_ids=[5, 6]), "line 2: `rollout_logprobs`"),
    (damaged(rollout_logprobs=[None, 0, 0]), "line 2: `rollout_logprobs`"),
    (damaged(weight_versions=[1]), "line 2: `weight_versions`"),
    (damaged().replace('"text"', '"old_logprobs": [0.5], "text"'), "line 2: `old_logprobs`"),
    (damaged(reward_parts=[0.5]), "line 2: `reward_parts`"),
    (damaged(reward_parts={"format": "0.5"}), "line 2: `reward_parts`"),
    (damaged(routing="AA=A"), "line 2: `routing`"),
    (damaged(routing=[1, 2]), "line 2: `routing`"),
    (damaged().replace('"answer"', '"more": 1, "answer"'), "line 2"),
]


@pytest.mark.parametrize(("text", "why"), DAMAGES, ids=[f"{number} {why}" for number, (_, why) in enumerate(DAMAGES)])
def test_a_damaged_record_is_one_sentence(tmp_path, replayed, capsys, text, why):
    path = tmp_path / "recorded" / "step_000001.jsonl"
    path.parent.mkdir()
    path.write_text(text)
    for more in ([], ["--sample", "a@5/0"]):
        assert main(["rollout", str(tmp_path), "--step", "1", *more]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: {path} is not a recorded step ({why}") and not printed.out
        assert printed.err.count("\n") == 1
    with pytest.raises(UserError, match="is not a recorded step"):
        replayed(prompts_per_step=1, samples_per_prompt=2)


def test_what_is_no_damage_is_read(tmp_path, replayed):
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "step_000001.jsonl").write_text(damaged().replace('"text"', '"later": [0.5], "text"').strip())
    assert replayed(prompts_per_step=1, samples_per_prompt=2).groups == [group()]


@pytest.mark.slow
def test_a_replayed_run_has_the_recorded_runs_metrics_bit_for_bit_and_no_engine(runs):
    sampling = ("rollout.dynamic_sampling=true", "rollout.max_oversample=2", "rollout.samples_per_prompt=2")
    code, printed = runs.finish("run.name=first", "rollout.record=true", *sampling, *SHORT)
    assert code == 0, printed
    replay = f"rollout.replay={runs.directory('first')}"
    # Names another engine, whose servers do not exist.
    nobody = ("rollout.backend=sglang", "sglang.urls=[http://127.0.0.1:9]")
    code, printed = runs.finish("run.name=again", replay, *nobody, *sampling, *SHORT)
    assert code == 0, printed
    rows = runs.rows("first")
    assert len(rows) == 3 and runs.rows("again") == rows
    assert all(row["groups_asked"] - row["groups_dropped"] + row["groups_filled"] == 6 for row in rows)
    assert any(row["groups_dropped"] for row in rows)
    gaps = [
        abs(a - b)
        for one in read_record(runs.directory("first") / "recorded", 2)[0]
        for sample in one["samples"]
        for a, b in zip(sample["rollout_logprobs"], sample["old_logprobs"], strict=True)
    ]
    assert max(gaps) == pytest.approx(rows[1]["logprob_gap_max"], rel=1e-3)
    code, printed = runs.finish("run.name=longer", replay, *sampling, *SHORT, "run.steps=4")
    assert code == 2 and "has 3 recorded steps, but not step 4" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_rollouts_only_are_those_that_training_would_have_begun_with(runs):
    process = runs.held("step 2", "--rollout-only", "run.name=only", *SHORT)  # when it has reached the end of step 1
    folder = runs.directory("only")
    process.kill()
    process.communicate()
    kept = runs.rows("only", times=True)[0]
    code, printed = runs.finish("--rollout-only", "run.name=only", HELD, *SHORT)
    assert code == 0, printed
    assert "step 3/3: reward" in printed and not list((folder / "checkpoints").iterdir())
    rows = runs.rows("only", times=True)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[0] == kept  # it went on where the record ended
    assert all({"reward_mean", "truncated", "time_rollout"} <= row.keys() and "loss" not in row for row in rows)
    assert main([str(folder)]) == 0
    assert runs.finish("run.name=trained", "rollout.record=true", *SHORT)[0] == 0

    def groups_of(name: str, step: int) -> list[str]:
        return [one["id"] for one in read_record(runs.directory(name) / "recorded", step)[0]]

    def ids(name: str, step: int) -> list[list[int]]:
        found, _ = read_record(runs.directory(name) / "recorded", step)
        return [sample["response_ids"] for one in found for sample in one["samples"]]

    assert ids("only", 1) == ids("trained", 1)
    assert [groups_of("only", step) for step in (1, 2, 3)] == [groups_of("trained", step) for step in (1, 2, 3)]
    assert ids("only", 2) != ids("trained", 2)  # it keeps the initial weights


SHOWN = """\
sample        a@5/0
reward        0.5 (ok, format 0.5)
finish        stop, 3 tokens
log-prob gap  mean 1.1e-01, largest 2.3e-01 at token 1
answer        42
prompt
    6 times 7?
response
    x €
    ~
    y

token       id  text   weights     engine    trainer        gap
    0        5  '<5>'        3    -0.1000    -0.2000    1.0e-01
    1        6  '<6>'        4    -0.3333    -0.1000    2.3e-01
    2        7  '<7>'        4    -0.0000     0.0000    2.0e-09"""
WITHOUT_TRAINER_AND_TOKENIZER = """\
sample        a@5/1
reward        0 (timeout)
finish        length, 1 tokens
log-prob gap  the trainer's log-probs were not recorded
answer        42
prompt
    6 times 7?
response
    ~

tokens are shown without text: its tokenizer is gone
token       id  text  weights     engine    trainer        gap
    0        8              4    -0.2500"""


def test_the_view_of_a_rollout_compares_both_log_probs_of_every_token(tmp_path):
    one = group("a")
    one.samples[0].text, one.samples[0].reward, one.samples[1].text = "x €\n\ny", 0.5, ""
    write_record(tmp_path / "recorded", 5, [one], {}, [[-0.2, -0.1, 0.0], [-0.25]])
    assert listing(tmp_path, 5).splitlines() == ["a@5/0  reward 0.5, 3 tokens, stop", "a@5/1  reward 0, 1 tokens, length"]
    assert view(tmp_path, 5, "a@5/0", lambda ids: [f"<{token}>" for token in ids]) == SHOWN.replace("~", "")
    write_record(tmp_path / "recorded", 6, [one], {}, None)
    assert view(tmp_path, 6, "a@5/1", "its tokenizer is gone") == WITHOUT_TRAINER_AND_TOKENIZER.replace("~", "")
    for name in ("b@5/0", "a@5/"):
        with pytest.raises(UserError, match=f"has no sample {name}; leave out --sample"):
            view(tmp_path, 5, name, "")
