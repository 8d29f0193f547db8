"""Curves, the progress line and the report, all from the same rows."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from etr_megatron.config import Config, ObserveConfig, RunConfig, to_dict
from etr_megatron.errors import UserError
from etr_megatron.observe import Recorder, RunDirectory
from etr_megatron.observe.__main__ import main as report
from etr_megatron.observe.progress import Progress, format_seconds
from etr_megatron.observe.report import summary
from etr_megatron.observe.writers import TensorBoardWriter, WandbWriter
from tests.test_observe import full_disk, make_row


def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_curves_are_cut_back_on_resume(tmp_path: Path) -> None:
    first = TensorBoardWriter(tmp_path, resumed_at=0)
    for step in range(1, 6):
        first.write(make_row(step, reward_mean=step / 8))
    # Not closed, as if the process had been killed.
    second = TensorBoardWriter(tmp_path, resumed_at=3)
    second.write(make_row(4, reward_mean=4.0))
    second.close()
    assert curve(tmp_path, "reward_mean") == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 4.0)]
    assert curve(tmp_path, "time/train") == [(step, 0.25) for step in range(1, 5)]
    first.close()


def test_tensorboard_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, resumed_at=0)
    writer.write(make_row(1, loss=float("nan")))
    writer.write(make_row(2, loss=0.5))
    writer.close()
    assert curve(tmp_path, "loss") == [(2, 0.5)]


def test_a_full_disk_under_tensorboard_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorBoardWriter(tmp_path, resumed_at=0)
    monkeypatch.setattr(writer._writer, "flush", full_disk)
    with pytest.raises(UserError, match=f"{tmp_path}: no space left"):
        writer.write(make_row(1))
    writer.close()


class FakeWandb(types.ModuleType):
    """Records the calls to W&B; a module because it is imported."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.step_metric: str | None = None
        self.errors = types.SimpleNamespace(Error=ConnectionError)

    def init(self, **settings: Any) -> FakeWandb:
        self.inits.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert name == "*"
        self.step_metric = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        pass


def test_a_resumed_wandb_run_keeps_its_id_and_draws_over_our_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config(run=RunConfig(name="first"), observe=ObserveConfig(wandb_project="etr"))
    for step in (1, 2):
        writer = WandbWriter(config, RunDirectory(tmp_path))
        writer.write(make_row(step, loss=float("nan")))
        writer.close()
    before, after = fake.inits
    assert before == after and before["project"] == "etr" and before["name"] == "first" and before["resume"] == "allow"
    assert before["id"] and before["config"] == to_dict(config)
    assert fake.step_metric == "step" and [row["step"] for row in fake.rows] == [1, 2]
    assert "loss" not in fake.rows[0] and fake.rows[0]["time/step"] == 0.25


def test_a_wandb_that_refuses_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()

    def refuse(**_settings: Any) -> FakeWandb:
        raise ConnectionError("api_key not configured")

    monkeypatch.setattr(fake, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"api_key not configured.*WANDB_MODE=offline"):
        WandbWriter(Config(observe=ObserveConfig(wandb_project="etr")), RunDirectory(tmp_path))


def test_missing_wandb_is_a_user_error_that_names_key_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = Config(observe=ObserveConfig(wandb_project="etr"))
    with pytest.raises(UserError, match=r"observe\.wandb_project is 'etr'.*pip install wandb"):
        Recorder(config, RunDirectory(tmp_path))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_plain_line_per_step_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(total=100, done=20)
    now[0] = 10.0
    progress.update(make_row(21, reward_mean=0.5, entropy=1.25, tokens_per_s=1234.4))
    now[0] = 30.0
    progress.update(make_row(22, reward_mean=0.5, entropy=1.25, tokens_per_s=1234.4, eval_accuracy=0.75))
    now[0] = 43.0
    of_sets = {"eval/aime24/accuracy": 0.25, "eval/amc23/accuracy": 0.75, "eval/amc23/pass_at_k": 1.0}
    progress.update(make_row(23, reward_mean=0.5, entropy=1.25, tokens_per_s=1234.4, eval_accuracy=0.5, **of_sets))
    progress.close()
    # 10 s for 1 step, 79 to go; then 15 s per step, 78 to go.
    assert capsys.readouterr().err.splitlines() == [
        "step 21/100: reward 0.500, entropy 1.250, 1,234 tokens/s, 13m 10s left",
        "step 22/100: reward 0.500, entropy 1.250, 1,234 tokens/s, eval accuracy 0.750, 19m 30s left",
        "step 23/100: reward 0.500, entropy 1.250, 1,234 tokens/s, eval accuracy 0.500 (aime24 0.250, amc23 0.750), "
        "18m 24s left",
    ]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    progress = Progress(total=4, done=1)
    for step in (2, 3, 4):
        progress.update(make_row(step, reward_mean=0.5))
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "4/4" in last and "reward 0.500" in last and stream.getvalue().count("\n") == 1


def test_what_was_found_out_later_joins_the_last_row_everywhere_unless_it_is_there(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    with Recorder(Config(), directory) as recorder:
        assert not recorder.lacks(1, "eval_accuracy")
        recorder.record(make_row(1))
        recorder.record(make_row(2))
        assert recorder.lacks(2, "eval_accuracy") and not recorder.lacks(1, "eval_accuracy") and not recorder.lacks(2, "loss")
        recorder.complete(2, {"eval_accuracy": 0.75})
        assert not recorder.lacks(2, "eval_accuracy")
    assert [row.get("eval_accuracy") for row in directory.metrics.rows()] == [None, 0.75]
    assert curve(directory.tensorboard, "eval_accuracy") == [(2, 0.75)]


def test_a_resumed_recorder_counts_its_own_steps_for_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Recorder(Config(), RunDirectory(tmp_path / "run"), resumed_at=98) as recorder:
        now[0] = 7.0
        (tmp_path / "run").mkdir(exist_ok=True)
        recorder.record(make_row(99))
    assert capsys.readouterr().err.rstrip().endswith(" 7s left")


def test_recorder_writes_the_row_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    with Recorder(Config(), directory) as recorder:
        recorder.record(make_row(1, reward_mean=0.5))
    assert [row["reward_mean"] for row in directory.metrics.rows()] == [0.5]
    assert curve(directory.tensorboard, "reward_mean") == [(1, 0.5)]
    assert capsys.readouterr().err.startswith("step 1/100: reward 0.500")


def make_run(root: Path) -> Path:
    directory = RunDirectory(root / "run")
    directory.prepare(Config())
    for step in range(1, 31):
        extra = {"eval_accuracy_start": 0.125} if step == 1 else {"eval_accuracy": step / 40} if step % 10 == 0 else {}
        extra |= {key.replace("accuracy", "pass_at_k"): value + 0.125 for key, value in extra.items()}
        for name in ("amc23", "a_name_longer_than_the_column"):
            extra |= {key.replace("eval_", f"eval/{name}/"): value / 2 for key, value in extra.items() if "/" not in key}
        row = make_row(step, reward_mean=step / 64, clip_frac_upper=0.02, clip_frac_lower=0.01, **extra)
        row["tokens_per_s"], row["time_step"] = 100.0, 3.0
        directory.metrics.append(row)
    return directory.root


def test_report_compares_first_and_last_tenth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(make_run(tmp_path))]) == 0
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "steps 1 to 30 (30 rows)",
        "reward first tenth 0.031, last tenth 0.453",  # means of steps 1..3 and 28..30 over 64
        "eval accuracy 0.125 (step 0) to 0.750 (step 30)",
        "amc23 0.062 (step 0) to 0.375 (step 30)",
        "a_name_longer_than_the_column 0.062 (step 0) to 0.375 (step 30)",
        "eval pass@k 0.250 (step 0) to 0.875 (step 30)",
        "clipped tokens 2.00% at the upper bound, 1.00% at the lower",
        "response tokens 9,000",
        "time 1m 30s",
        "truncated 60 samples",
        "zero variance 30 groups",
        "reward timeouts 0",
    ]


def test_report_names_the_best_evaluation_if_it_is_not_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    RunDirectory(run).metrics.append(make_row(40, eval_accuracy=0.5))
    assert report([str(run)]) == 0
    told = " ".join(capsys.readouterr().out.splitlines()[2].split())
    assert told == "eval accuracy 0.125 (step 0) to 0.500 (step 40), best 0.750 (step 30)"


def test_report_counts_answers_that_could_not_be_graded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    RunDirectory(run).metrics.append(make_row(31, reward_errors=7))
    assert report([str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["reward", "errors", "7"]


@pytest.mark.parametrize(("key", "value"), [("reward_mean", None), ("truncated", "x"), ("entropy", [1])])
def test_report_names_a_row_that_somebody_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    run = make_run(tmp_path)
    file = RunDirectory(run).metrics.path
    *before, last = file.read_text().splitlines(keepends=True)
    row = {name: number for name, number in json.loads(last).items() if name != key}
    file.write_text("".join(before) + json.dumps(row | ({key: value} if value else {})) + "\n")
    assert report([str(run)]) == 2
    told = capsys.readouterr()
    assert told.err == f"error: {file}: {key} of step {row['step']} is missing or not a number; fix or remove the line\n"


def test_report_works_as_a_module_and_names_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "etr_megatron.observe", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'none'}/metrics.jsonl does not exist")
    assert len(done.stderr.splitlines()) == 1


def test_report_names_what_is_no_file_of_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    assert report([str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'run' / 'metrics.jsonl'}: Is a directory\n"


def test_report_picture_needs_matplotlib_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert report([str(run), "--png", str(tmp_path / "curves.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.slow
def test_report_draws_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert report([str(make_run(tmp_path)), "--png", str(tmp_path / "nowhere" / "curves.png")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: --png {tmp_path / 'nowhere' / 'curves.png'}: cannot be written (No such file or directory)\n"
    assert report([str(tmp_path / "run"), "--png", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_short_run_the_report_has_its_first_and_last_step_and_a_reward_of_zero_counts() -> None:
    rows = [make_row(step, reward_mean=(step - 1) / 8) for step in range(1, 10)]
    assert "first tenth 0.000, last tenth 1.000" in summary(rows) and "clipped tokens" in summary(rows)
    rows = [make_row(step, reward_mean=0.5 * (step % 2)) for step in range(1, 21)]
    assert "first tenth 0.250, last tenth 0.250" in summary(rows)
    for row in rows:
        del row["loss"]  # as in a run that only makes rollouts
    assert "clipped tokens" not in summary(rows)


def test_the_report_tells_of_sets_that_the_last_step_did_not_evaluate_and_leaves_out_what_was_not_finite() -> None:
    rows = [make_row(step) for step in range(1, 21)]
    rows[0] |= {"eval_accuracy": 0.5, "eval/amc23/accuracy": 0.25}
    for row in rows:
        row |= {"reward_mean": None, "tokens_per_s": None, "time_step": 3.0, "truncated": None}
    rows[1] |= {"reward_mean": 0.75, "tokens_per_s": 300.0}
    told = summary(rows)
    assert "reward            first tenth 0.750, last tenth not finite\n" in told
    assert "  amc23           0.250 (step 1) to 0.250 (step 1)\n" in told
    assert "response tokens   900\n" in told and "truncated         0 samples\n" in told


def test_the_report_tells_each_training_sets_reward_over_the_steps_that_have_groups_of_it() -> None:
    rows = [make_row(step) for step in range(1, 21)]
    for row, gsm8k, rare in ((rows[0], 0.25, None), (rows[1], 0.75, None), (rows[18], None, 1.0), (rows[19], 1.0, 0.5)):
        own = {"train/gsm8k/reward_mean": gsm8k, "train/rare/reward_mean": rare}
        row |= {key: value for key, value in own.items() if value is not None} | {"train/rare/groups": 0}
    told = summary(rows).splitlines()
    assert told[2:4] == [
        "  gsm8k           first tenth 0.500, last tenth 1.000",
        "  rare            first tenth no groups, last tenth 0.750",
    ]
    assert told[1].startswith("reward            first tenth ") and told[4].startswith("eval accuracy")


def test_the_bar_of_a_resumed_run_goes_on_from_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    progress = Progress(total=30, done=25)
    progress.update(make_row(26))
    progress.update(make_row(28))
    progress.close()
    assert "25/30" in stream.getvalue() and "28/30" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(59.4, "59s"), (60, "1m 00s"), (3599, "59m 59s"), (3600, "1h 00m")])
def test_a_time_is_told_in_its_own_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
