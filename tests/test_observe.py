"""metrics.jsonl and atomic writes, and their behaviour on a full disk and after kill -9."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from etr_megatron.config import Config
from etr_megatron.errors import UserError
from etr_megatron.objective import PASS_RATE_BINS
from etr_megatron.observe import METRIC_KEYS, MetricsLog, MetricsRow, RunDirectory
from etr_megatron.observe.metrics import OPTIONAL_METRIC_KEYS, PASS_RATE_KEYS
from etr_megatron.observe.reference import render_reference
from etr_megatron.observe.report import load_rows
from etr_megatron.platform.files import disk_errors

# Written out from the specification, because the code's own list is under test.
SPECIFIED_KEYS = [
    "step",
    "weight_version",
    "reward_mean",
    "accuracy",
    "entropy",
    "loss",
    "grad_norm",
    "lr",
    "ratio_mean",
    "effective_sample_size",
    "clip_frac_upper",
    "clip_frac_lower",
    "clip_radius_mean",
    "clip_radius_p10",
    "clip_radius_p90",
    "kl",
    "logprob_gap_mean",
    "logprob_gap_max",
    "mismatch_kl",
    "correction_mean",
    "correction_frac",
    "zero_variance_groups",
    "truncated",
    "reward_timeouts",
    "reward_errors",  # not in the specification: see MetricsRow
    "response_tokens_mean",
    "tokens_per_s",
    "time_rollout",
    "time_reward",
    "time_train",
    "time_sync",
    "time_step",
]


def make_row(step: int, **values: float) -> MetricsRow:
    row = {key: 0.25 for key in SPECIFIED_KEYS} | {"step": step, "weight_version": step - 1}
    return MetricsRow(**(row | {"zero_variance_groups": 1, "truncated": 2, "reward_timeouts": 0, "reward_errors": 0} | values))


def full_disk(*_args: object, **_kwargs: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_metric_keys_are_those_of_the_specification() -> None:
    assert list(METRIC_KEYS) == SPECIFIED_KEYS


def test_rows_come_back_in_the_files_key_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    shuffled = dict(reversed(make_row(1, eval_accuracy=0.5).items()))
    log.append(MetricsRow(**shuffled))
    log.append(make_row(2))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert list(json.loads(lines[0])) == [*SPECIFIED_KEYS, "eval_accuracy"]
    assert log.rows() == [make_row(1, eval_accuracy=0.5), make_row(2)]


def test_keys_by_pass_rate_and_of_the_loss_are_optional(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    extra = {"clip_frac_upper_pass_0_25": 0.5, "clip_radius_p90_pass_75_100": math.nan, "loss/gap": 2.0}
    log.append(MetricsRow(**make_row(1), **extra))
    written = log.rows()[0]
    assert [written[key] for key in extra] == [0.5, None, 2.0]
    with pytest.raises(ValueError, match="unknown keys \\['clip_frac_upper_pass_10_20'\\]"):
        log.append(make_row(2, clip_frac_upper_pass_10_20=0.5))


def test_pass_rate_keys_follow_the_objectives_bins() -> None:
    names = ("clip_frac_upper", "clip_frac_lower", "clip_radius_mean", "clip_radius_p10", "clip_radius_p90")
    assert set(PASS_RATE_KEYS) == {f"{name}_{place}" for name in names for place in PASS_RATE_BINS}


@pytest.mark.parametrize("key", SPECIFIED_KEYS)
def test_a_row_without_one_of_its_keys_is_refused(tmp_path: Path, key: str) -> None:
    row = dict(make_row(1))
    del row[key]
    with pytest.raises(ValueError, match=f"missing keys \\['{key}'\\]"):
        MetricsLog(tmp_path / "metrics.jsonl").append(row)  # type: ignore[arg-type]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_unknown_keys_and_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="unknown keys \\['rewards_mean'\\]"):
        log.append(make_row(1, rewards_mean=1.0))
    with pytest.raises(TypeError, match="loss is None"):
        log.append(make_row(1, loss=None))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="truncated is True"):
        log.append(make_row(1, truncated=True))
    with pytest.raises(TypeError, match=r"step is 1\.0"):
        log.append(make_row(1) | {"step": 1.0})  # type: ignore[arg-type]


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(make_row(1, loss=math.nan, grad_norm=math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is None and row["grad_norm"] is None and row["kl"] == 0.25


def test_a_step_cannot_be_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(make_row(3))
    with pytest.raises(ValueError, match="step 3 after that of step 3"):
        MetricsLog(path).append(make_row(3))
    log = MetricsLog(path)
    log.append(make_row(5))
    for step in (5, 4):
        with pytest.raises(ValueError, match=f"step {step} after that of step 5"):
            log.append(make_row(step))
    assert [row["step"] for row in log.rows()] == [3, 5]


def test_cut_back_keeps_rows_up_to_the_step_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 4):
        log.append(make_row(step, loss=step / 3))
    kept = path.read_bytes()
    for step in range(4, 7):
        log.append(make_row(step))
    assert log.truncate_after(3) == 3
    assert path.read_bytes() == kept
    log.append(make_row(4))
    assert [row["step"] for row in log.rows()] == [1, 2, 3, 4]
    assert log.truncate_after(0) == 4 and log.rows() == []


def test_a_value_found_out_later_joins_the_last_row_and_no_other(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(make_row(1))
    log.append(make_row(2, loss=math.inf))
    before = log.path.read_text().splitlines()
    for step, values in ((1, {"eval_accuracy": 0.5}), (2, {"loss": 0.5})):
        with pytest.raises(ValueError, match="metrics row of step 2 cannot be given"):
            log.complete(step, values)
    log.complete(2, {"eval_accuracy": 0.5})
    first, second = log.rows()
    assert log.path.read_text().splitlines()[0] == before[0] and first == json.loads(before[0])
    assert second == json.loads(before[1]) | {"eval_accuracy": 0.5} and second["loss"] is None
    log.append(make_row(3))
    assert [row["step"] for row in log.rows()] == [1, 2, 3]


def test_a_torn_last_line_does_not_count_and_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(make_row(1))
    whole = path.read_bytes()
    torn = json.dumps(make_row(2)).encode()  # complete JSON, but without its newline
    path.write_bytes(whole + torn)
    assert [row["step"] for row in MetricsLog(path).rows()] == [1]
    MetricsLog(path).append(make_row(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    path.write_bytes(whole + torn[:40])
    MetricsLog(path).truncate_after(5)
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        MetricsLog(path).rows()


def test_rows_survive_kill_9_of_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from pathlib import Path; from etr_megatron.observe.metrics import MetricsLog\n"
        "from tests.test_observe import make_row\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(1, 10**6):\n    log.append(make_row(step)); print(step, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    steps = [row["step"] for row in MetricsLog(path).rows()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= acknowledged[-1]


def test_a_full_disk_is_a_user_error_and_leaves_the_last_whole_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(make_row(1))
    before = path.read_bytes()
    real_write = os.write
    calls: list[int] = []

    def half_then_full(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        return real_write(descriptor, data[:30]) if len(calls) == 1 else full_disk()

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: no space left"):
        log.append(make_row(2))
    monkeypatch.undo()
    assert len(calls) == 2 and path.read_bytes() == before
    log.append(make_row(2))
    assert [row["step"] for row in log.rows()] == [1, 2]


def test_a_really_full_disk_is_a_user_error() -> None:
    with (
        pytest.raises(UserError, match=r"curves\.png: no space left"),
        disk_errors(Path("curves.png")),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_an_atomic_write_on_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(Config())
    directory.write_status("running", step=3, steps=9)
    before = directory.status_file.read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"status\.json: no space left"):
        directory.write_status("finished", step=9, steps=9)
    assert directory.status_file.read_bytes() == before
    assert not list(directory.root.glob(".*"))


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=rf"metrics\.jsonl is a file; give the directory of a run, such as {tmp_path}"):
        load_rows(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl has no rows yet"):
        load_rows(tmp_path)
    with pytest.raises(UserError, match=r"none/metrics\.jsonl does not exist; give the directory of a run"):
        load_rows(tmp_path / "none")


def test_the_reference_is_current_and_explains_every_key() -> None:
    docs = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    assert docs == render_reference(), "run: python -m etr_megatron.observe.reference > docs/metrics.md"
    told = [line.split("`")[1] for line in docs.splitlines() if line.startswith("| `")]
    assert told == [key for key in (*METRIC_KEYS, *OPTIONAL_METRIC_KEYS) if key not in PASS_RATE_KEYS]
    assert not [line for line in docs.splitlines() if line.endswith("|  |")]
