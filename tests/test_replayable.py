"""Problems of a recorded run are reported before the first step of its replay, and quickly for a large record."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from etr_megatron.checks import check_inputs
from etr_megatron.config import Config, ModelConfig, RewardConfig, RolloutConfig, RunConfig
from etr_megatron.errors import UserError
from etr_megatron.rollout import replayable
from etr_megatron.rollout.record import group_to_json, read_record, record_path, write_record
from etr_megatron.rollout.replayable import survey
from etr_megatron.types import Group, Problem, Sample


def group(name: str) -> Group:
    samples = [Sample(index, [5, 6], [-0.1, -0.5], "stop", 4, "x", 1.0, "ok") for index in range(2)]
    return Group(name, Problem(name, "6 times 7?", "42", [1, 2]), samples)


def look(folder: Path, steps: int, prompts: int, samples: int, **reward: float) -> list[str]:
    rollout = RolloutConfig(prompts_per_step=prompts, samples_per_prompt=samples)
    return survey(folder, steps, Config(rollout=rollout, reward=RewardConfig(**reward)))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Ten steps of three groups of two samples."""
    for step in range(1, 11):
        write_record(tmp_path / "recorded", step, [group(name) for name in "abc"], {"groups_asked": 3}, None)
    return tmp_path / "recorded"


@pytest.fixture(params=[replayable.READ_BYTES, 1], ids=["small", "large"])
def size(request, monkeypatch) -> str:
    """The record's size: of a large one, only the first step is read in full."""
    monkeypatch.setattr(replayable, "READ_BYTES", request.param)
    return "large" if request.param == 1 else "small"


def test_a_whole_record_is_replayable(recorded, size):
    assert look(recorded, 10, 3, 2) == look(recorded, 4, 3, 2) == []


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: content[:-40], ""),
        (lambda content: content[: content.index(b"\n") + 1], "it has no groups"),
        (lambda content: b"", ""),
        (lambda content: b'{"ste', "line 1: not JSON"),
        (lambda content: content[content.index(b"\n") + 1 :], "line 1: `counts` is missing in the head"),
        (lambda content: b"\xff" + content, ""),
        (lambda content: content.replace(b"\n", b" "), "line 1: not JSON"),
    ],
    ids=["cut_off", "no_groups", "empty", "no_line", "no_head", "not_text", "no_lines"],
)
def test_a_step_that_is_damaged_is_known_before_it_is_reached(recorded, size, damage, why):
    path = record_path(recorded, 7)
    path.write_bytes(damage(path.read_bytes()))
    (told,) = look(recorded, 10, 3, 2)
    assert told.startswith(f"{path} is not a recorded step (") and why in told
    assert look(recorded, 6, 3, 2) == []  # a run with fewer steps never reaches it


def test_of_a_small_record_every_line_is_looked_at(recorded):
    path = record_path(recorded, 10)
    path.write_text(path.read_text().replace('"reward"', '"rewards"', 1))
    assert look(recorded, 10, 3, 2) == [f"{path} is not a recorded step (line 2: `reward` is missing in a sample)"]


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        ('"text": "', '"text": 3, "t": "', "line 2: `text` of a sample must be str, not int"),
        ('"reward": ', '"reward": "", "r": ', "line 2: `reward` of a sample must be int or float, not str"),
        ('"answer": ', '"tag": 1, "answer": ', "line 2: a problem has the unknown key `tag`"),
    ],
)
def test_what_is_wrong_with_a_line_is_told(recorded, was, now, why):
    path = record_path(recorded, 7)
    path.write_text(path.read_text().replace(was, now, 1))
    with pytest.raises(UserError, match=re.escape(f"is not a recorded step ({why})")):
        read_record(recorded, 7)


def test_all_that_keeps_a_record_from_being_replayed_is_told_at_once(recorded, size):
    for step in (5, 6, 7, 8, 9):
        record_path(recorded, step).write_text("")
    missing, misfit, *damaged, more = look(recorded, 12, 4, 8)
    assert missing.endswith(
        "has 10 recorded steps, but not step 11; lower run.steps, or give a run that recorded all of them (with "
        "rollout.record=true)"
    )
    assert misfit == (
        f"step 1 in {recorded} has 3 groups of 2 samples; set rollout.prompts_per_step=3 and rollout.samples_per_prompt=2 to "
        "replay it"
    )
    assert [str(record_path(recorded, step)) in told for step, told in zip((5, 6, 7), damaged, strict=True)] == [True] * 3
    assert more == f"{recorded} has 2 more damaged steps"


def test_rewards_of_another_range_are_told_before_the_first_step(recorded, size):
    (told,) = look(recorded, 10, 3, 2, range_min=-1.0, range_max=0.5)
    assert told == (
        f"step 1 in {recorded} has a reward of 1.0, outside of reward.range_min = -1.0 to reward.range_max = 0.5; set both "
        "to the values of the recorded run"
    )


def test_a_directory_that_is_no_recorded_run_is_told_from_one_that_is_not_there(tmp_path):
    assert look(tmp_path / "recorded", 1, 3, 2)[0].startswith(f"there is no directory {tmp_path / 'recorded'}; ")
    (tmp_path / "recorded").mkdir()
    assert look(tmp_path / "recorded", 1, 3, 2)[0].startswith(
        f"{tmp_path / 'recorded'} has no recorded steps; give the directory of a run"
    )


def test_a_large_record_is_not_read_through_before_the_start(recorded, monkeypatch):
    size, read = record_path(recorded, 1).stat().st_size, []
    monkeypatch.setattr(replayable, "READ_BYTES", 2 * size)
    monkeypatch.setattr(
        replayable, "read_record", lambda folder, step: read.append(step) or ([group_to_json(group("a"))] * 3, {})
    )
    for step in range(11, 2001):
        os.link(record_path(recorded, 1), record_path(recorded, step))
    assert look(recorded, 2000, 3, 2) == [] and read == [1, 2]


@pytest.mark.parametrize("state", ["failed", "finished"])
def test_a_run_is_not_replayed_into_itself(recorded, state):
    """Happens if the config has the recorded run's name. The run would lose what it recorded after its last checkpoint."""
    run = recorded.parent
    (run / "status.json").write_text(f'{{"state": "{state}"}}')
    (run / "link").symlink_to(run)
    rollout = RolloutConfig(replay=str(run / "link"), prompts_per_step=3, samples_per_prompt=2)
    config = Config(run=RunConfig(dir=str(run.parent), name=run.name, steps=3), rollout=rollout)
    with pytest.raises(UserError) as caught:
        check_inputs(config, 1)
    assert str(caught.value) == f"{run} is the run in rollout.replay and would be overwritten; choose another run.name"


def test_a_replay_that_cannot_be_is_told_beside_other_mistakes(recorded, tmp_path):
    rollout = RolloutConfig(replay=str(recorded.parent), prompts_per_step=3, samples_per_prompt=4)
    model, run = ModelConfig(path=str(tmp_path / "nowhere")), RunConfig(dir=str(tmp_path / "runs"), steps=11)
    with pytest.raises(UserError) as caught:
        check_inputs(Config(run=run, model=model, rollout=rollout), 1)
    model, missing, misfit = str(caught.value).splitlines()
    assert model.startswith("model.path: ") and missing.startswith("rollout.replay: ") and "but not step 11" in missing
    assert misfit.startswith("rollout.replay: step 1 in ") and misfit.endswith("set rollout.samples_per_prompt=2 to replay it")
