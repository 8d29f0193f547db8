"""The run directory: its parts, who may use it, and the errors for a place that cannot be written or read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from etr_megatron.config import (
    ArithmeticConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ObjectiveConfig,
    RunConfig,
    SglangConfig,
    load_config,
)
from etr_megatron.errors import UserError
from etr_megatron.observe import RunDirectory
from etr_megatron.types import Group, Problem, Sample
from tests.test_observe import make_row


def test_a_run_directory_has_its_parts(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "runs" / "first")
    assert directory.prepare(Config(run=RunConfig(seed=7), arithmetic=ArithmeticConfig(operators=("+", "-")))) == []
    directory.write_status("running", step=0, steps=100)
    assert {path.name for path in directory.root.iterdir()} == {
        "config.yaml",
        "rollouts",
        "checkpoints",
        "status.json",
    }
    written = yaml.safe_load(directory.config_file.read_text())
    assert written["run"]["seed"] == 7 and written["arithmetic"]["operators"] == ["+", "-"]
    assert json.loads(directory.status_file.read_text())["state"] == "running"


def test_a_run_directory_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written"):
        RunDirectory(tmp_path / "file" / "run").prepare(Config())


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_run_directory_where_none_can_be_made_is_a_user_error() -> None:
    directory, said = RunDirectory(Path("/proc/x/y")), r"^/proc/x/y: cannot be written \(No such file or directory\)"
    with pytest.raises(UserError, match=said), directory.locked():
        pass
    with pytest.raises(UserError, match=said):
        directory.prepare(Config())


def test_a_run_name_that_is_too_long_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\); choose another run\.dir or run\.name$"):
        RunDirectory(tmp_path / ("x" * 300)).refuse_if_used(resume=True)
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\); choose another run\.dir or run\.name$"):
        RunDirectory(tmp_path / ("x" * 300)).refuse_if_unwritable()


def test_a_run_directory_that_may_not_be_looked_into_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **options: bool) -> os.stat_result:  # file modes do not restrict root, so it is simulated
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match=r"/run: cannot be written \(Permission denied\)"):
        RunDirectory(tmp_path / "run").refuse_if_used(resume=True)


@pytest.mark.parametrize("place", ["file/run", "file/deeper/run"])
def test_a_place_that_cannot_be_written_is_known_before_anything_is_started(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run: cannot be written \(Not a directory\); choose another run.dir or run.name$"):
        RunDirectory(tmp_path / place).refuse_if_unwritable()
    with pytest.raises(UserError, match=r"^/proc/x/y: cannot be written"):
        RunDirectory(Path("/proc/x/y")).refuse_if_unwritable()


def test_a_look_whether_a_place_can_be_written_leaves_it_as_it_is(tmp_path: Path) -> None:
    for _ in range(2):
        RunDirectory(tmp_path / "a" / "b" / "run").refuse_if_unwritable()
        assert not any(tmp_path.iterdir())
    (tmp_path / "a" / "run").mkdir(parents=True)
    RunDirectory(tmp_path / "a" / "run").refuse_if_unwritable()
    assert (tmp_path / "a" / "run").is_dir()


def test_a_used_directory_is_refused_without_resume(tmp_path: Path) -> None:
    config = Config(checkpoint=CheckpointConfig(resume=False))
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(config)
    directory.prepare(config)  # a start without results leaves nothing to protect
    directory.metrics.append(make_row(1))
    with pytest.raises(UserError, match=r"checkpoint\.resume is false"):
        directory.prepare(config)
    directory.prepare(Config())


@pytest.mark.parametrize("name", ["rollouts/step_000001.jsonl", "checkpoints/step_000001", "metrics.jsonl"])
def test_any_result_makes_a_directory_used_and_an_empty_file_none(tmp_path: Path, name: str) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    directory.metrics.path.touch()
    assert not directory.is_used()
    (directory.root / name).write_text("{}\n")
    assert directory.is_used()
    with pytest.raises(UserError, match="holds an earlier run"):
        directory.refuse_if_used(resume=False)
    directory.refuse_if_used(resume=True)


def test_a_finished_run_goes_on_from_a_checkpoint_alone(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    directory.write_status("finished", step=3, steps=3)
    with pytest.raises(UserError, match="holds a finished run without a checkpoint to continue from"):
        directory.prepare(Config())
    (directory.checkpoints / "step_000003").mkdir()
    directory.prepare(Config())


def test_the_settings_of_a_start_that_came_to_nothing_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config(run=RunConfig(seed=7)))
    assert directory.prepare(Config(run=RunConfig(seed=8))) == [] and not caplog.messages
    assert yaml.safe_load(directory.config_file.read_text())["run"]["seed"] == 8


def test_a_key_that_the_start_did_not_know_is_no_change(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    directory.metrics.append(make_row(1))
    settings = yaml.safe_load(directory.config_file.read_text())
    del settings["objective"]["log_ratio_bound"]
    directory.config_file.write_text(yaml.safe_dump(settings))
    assert directory.prepare(Config()) == []


def test_a_running_state_is_that_of_a_process_that_is_there(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    assert directory.read_state() is None
    for state in ("running", "finished", "failed", "requeue"):
        with directory.locked():
            directory.write_status(state, step=1, steps=3)
            assert directory.read_state() == state
        assert directory.read_state() == ("interrupted" if state == "running" else state)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_directory_in_the_place_of_a_runs_file_is_a_user_error(tmp_path: Path, name: str) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: .*Is a directory"):
        directory.prepare(Config())
        directory.truncate_after(0)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"run: {name: \xff\xfe}\n", "not YAML"), (b"run: [", "not YAML"), (b"- run", "not a conf"), (b"run: 3", "not a conf")],
)
def test_a_damaged_config_of_an_earlier_start_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    directory.metrics.append(make_row(1))
    directory.config_file.write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.yaml: {said}.*restore it or remove it"):
        directory.prepare(Config())


def resumed(directory: RunDirectory, config: Config, step: int) -> list[str]:
    """The changed keys of a start that continues after `step`."""
    changes = directory.prepare(config)
    directory.truncate_after(step)
    directory.continue_with(config, step)
    return changes


def presets(directory: RunDirectory) -> dict[str, str]:
    """`objective.preset` by the name of every config of the run."""
    files = sorted(directory.root.glob("config*.yaml"))
    return {file.name: yaml.safe_load(file.read_text())["objective"]["preset"] for file in files}


def with_preset(name: str) -> Config:
    return Config(objective=ObjectiveConfig(preset=name))


@pytest.fixture
def used(tmp_path: Path) -> RunDirectory:
    """The directory of a run with 40 steps and the default config."""
    directory = RunDirectory(tmp_path / "run")
    resumed(directory, Config(), 0)
    for step in range(1, 41):
        directory.metrics.append(make_row(step))
    return directory


def test_resuming_with_other_settings_warns_and_keeps_the_former_ones(
    used: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    before = used.config_file.read_bytes()
    changed = Config(objective=ObjectiveConfig(preset="grpo", kl_coef=0.1), run=RunConfig(steps=200))
    assert used.prepare(changed) == ["objective.preset", "objective.kl_coef"]
    assert "differ from its last start: objective.preset ('etr' -> 'grpo'); obj" in caplog.text and "run.s" not in caplog.text
    assert used.config_file.read_bytes() == before  # the checkpoint may not fit these settings
    used.continue_with(changed, 25)
    assert (used.root / "config.step_000025.yaml").read_bytes() == before
    assert load_config(used.config_file, []) == changed
    caplog.clear()
    assert resumed(used, changed, 30) == [] and not caplog.text
    assert presets(used) == {"config.step_000025.yaml": "etr", "config.yaml": "grpo"}


def test_each_kept_config_is_that_of_the_steps_up_to_its_own_which_were_not_cut_back(used: RunDirectory) -> None:
    resumed(used, with_preset("grpo"), 20)
    resumed(used, with_preset("dapo"), 20)  # no step is left of the start before
    assert presets(used) == {"config.step_000020.yaml": "etr", "config.yaml": "dapo"}
    resumed(used, with_preset("gspo"), 30)
    assert presets(used) == {"config.step_000020.yaml": "etr", "config.step_000030.yaml": "dapo", "config.yaml": "gspo"}
    resumed(used, with_preset("rloo"), 25)  # the checkpoint of step 30 was removed
    assert presets(used) == {"config.step_000020.yaml": "etr", "config.step_000025.yaml": "dapo", "config.yaml": "rloo"}
    resumed(used, with_preset("etr"), 20)
    assert presets(used) == {"config.yaml": "etr"}


def test_a_run_that_starts_anew_without_a_checkpoint_keeps_no_former_settings(used: RunDirectory) -> None:
    resumed(used, with_preset("grpo"), 20)
    resumed(used, with_preset("dapo"), 0)
    assert presets(used) == {"config.yaml": "dapo"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (Config(data=DataConfig(eval={"a": "b.jsonl"})), "data.eval ('arithmetic' -> {'a': 'b.jsonl'})"),
        (Config(sglang=SglangConfig(servers=2, fp8=True)), "last start: sglang.fp8 (False -> True)\n"),
        (Config(checkpoint=CheckpointConfig(keep=3, keep_best=1)), "last start: checkpoint.keep_best (0 -> 1)\n"),
        (Config(eval=EvalConfig(samples=4, temperature=0.6)), "eval.samples (1 -> 4); eval.temperature (0.0 -> 0.6)"),
    ],
)
def test_resuming_with_other_held_out_sets_or_other_ways_to_answer_is_told(
    used: RunDirectory, caplog: pytest.LogCaptureFixture, config: Config, told: str
) -> None:
    resumed(used, config, 20)
    assert told in caplog.text and (used.root / "config.step_000020.yaml").exists()


def test_resuming_for_more_steps_or_other_times_of_evaluation_writes_the_config_again(
    used: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    assert resumed(used, Config(run=RunConfig(steps=200), eval=EvalConfig(every=5)), 20) == []
    assert caplog.text == "" and yaml.safe_load(used.config_file.read_text())["run"]["steps"] == 200
    assert len(presets(used)) == 1


def make_group() -> Group:
    samples = [
        Sample(0, [5, 6, 7], [-0.5, -1.0, -0.75], "stop", 4, "es sind \\boxed{42} €", 1.0, "ok"),
        Sample(1, [], [], "length", 4, "", 0.0, "timeout"),
    ]
    return Group("train.jsonl:3@12", Problem("train.jsonl:3", "6 times 7?", "42", [1, 2]), samples)


def test_saved_rollouts_are_readable_one_sample_per_line(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    path = directory.save_rollouts(12, [make_group()])
    assert path == directory.rollouts / "step_000012.jsonl"
    assert "€" in path.read_text()  # not \u20ac: people read it
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "step": 12,
        "group": "train.jsonl:3@12",
        "problem": "train.jsonl:3",
        "sample": 0,
        "prompt": "6 times 7?",
        "response": "es sind \\boxed{42} €",
        "answer": "42",
        "reward": 1.0,
        "status": "ok",
        "finish_reason": "stop",
        "weight_version": 4,
        "tokens": 3,
        "mean_logprob": -0.75,
    }
    assert second["mean_logprob"] is None and second["status"] == "timeout" and second["finish_reason"] == "length"


def test_an_evaluation_before_the_first_step_is_no_result_that_another_start_would_mix_with_its_own(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    assert directory.save_evaluation(0, [make_group()]) == directory.evaluations / "step_000000.jsonl"
    assert not directory.is_used()


def test_rollouts_and_metrics_are_cut_back_together(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    for step in (1, 2, 3, 1_000_000):
        directory.metrics.append(make_row(step))
        directory.save_rollouts(step, [make_group()])
        directory.save_evaluation(step, [make_group()])
    shutil.copytree(directory.rollouts, directory.recorded)
    for name in ("notes.txt", "step_000003.jsonl.jsonl"):
        (directory.rollouts / name).write_text("mine")
    directory.truncate_after(2)
    kept = {"step_000001.jsonl", "step_000002.jsonl"}
    assert {path.name for path in directory.rollouts.iterdir()} == {*kept, "notes.txt", "step_000003.jsonl.jsonl"}
    assert {path.name for path in directory.recorded.iterdir()} == kept
    assert {path.name for path in directory.evaluations.iterdir()} == kept
    assert [row["step"] for row in directory.metrics.rows()] == [1, 2]
