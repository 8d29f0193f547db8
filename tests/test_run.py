"""The whole loop through the launcher: what a run leaves behind, bit-exact resume, kills, a full disk."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from etr_megatron.config import load_config
from etr_megatron.observe import METRIC_KEYS, RunDirectory
from tests.runs import HELD, REPO, Runs, wait_for

pytestmark = pytest.mark.slow

ONE_RANK = "parallel.tp=1"
"""For tests that do not need several ranks: on two cores, two ranks take nearly twice as long to start."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory, _tiny_cache):
    """Rows of the small run without interruptions."""
    runs = Runs(tmp_path_factory.mktemp("straight"), _tiny_cache)
    options = ("run.name=straight", "observe.tensorboard=true", "checkpoint.every=2", "checkpoint.keep=2")
    code, printed = runs.finish(*options, cold=True)
    assert code == 0, printed
    assert "step 6/6: reward" in printed and "Warning" not in printed and "leaked" not in printed
    return runs


def without_evaluation(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith("eval_")} for row in rows]


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def assert_nobody_is_left(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_run_leaves_config_metrics_rollouts_and_checkpoints(straight):
    rows, folder = straight.rows("straight", times=True), straight.directory("straight")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["weight_version"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert all(set(METRIC_KEYS) <= row.keys() for row in rows)
    assert all(row["logprob_gap_max"] < 1e-4 and row["time_train"] > 0 for row in rows)
    assert all(row["tflops_per_gpu"] > 0 and "mfu" not in row for row in rows)  # a CPU's peak is not known
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [3, 6]
    assert "eval_accuracy_start" in rows[0]
    assert max(row["clip_frac_upper"] + row["clip_frac_lower"] for row in rows) > 0
    assert (folder / "config.yaml").is_file() and list((folder / "tensorboard").iterdir())
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["step_000004", "step_000006"]
    sample = json.loads((folder / "rollouts" / "step_000006.jsonl").read_text().splitlines()[0])
    assert {"prompt", "response", "answer", "reward"} <= sample.keys()


def kill(process: subprocess.Popen) -> None:
    members = family(process.pid)
    process.kill()
    process.wait()
    assert_nobody_is_left(members)


def test_told_to_stop_then_killed_in_a_save_and_in_a_step_it_is_the_same_run_bit_for_bit(runs, straight):
    options, wanted = ("run.name=again", "run.stop_grace_s=600"), straight.rows("straight")
    process = runs.held("step 2", *options)
    members = family(process.pid)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=500)
    assert process.returncode == 75, printed
    assert "told to stop (SIGTERM) before the rollout of step 3" in printed and "Traceback" not in printed
    assert_nobody_is_left(members)
    status = json.loads((runs.directory("again") / "status.json").read_text())
    assert (status["state"], status["step"]) == ("requeue", 2)
    stopped = runs.saved_rows("again")
    assert len(stopped) == 2 and runs.rows("again") == wanted[:2]

    kill(runs.held("saving 3", *options))
    saves = runs.directory("again") / "checkpoints"
    assert any(saves.glob(".step_000003.unfinished/*"))
    assert len(runs.saved_rows("again")) == 2 and runs.rows("again") == wanted[:3]

    kill(runs.held("step 5", *options))
    runs.assert_went_on("again", stopped)
    saved = runs.saved_rows("again")
    assert len(saved) == 3 and runs.rows("again") == wanted[:5] and not list(saves.glob(".step_*"))
    (saves / ".step_000005.unfinished").mkdir()  # a save that was cut short is not a checkpoint

    code, printed = runs.finish(*options, HELD)
    assert code == 0 and "Warning" not in printed, printed
    assert runs.rows("again") == wanted and all(row["reward_timeouts"] == 0 for row in wanted)
    runs.assert_went_on("again", saved)
    assert not list(saves.glob(".step_*"))


def test_a_run_goes_on_while_its_checkpoint_is_written_and_waits_for_it_when_told_to_stop(runs, straight):
    options, wanted = ("run.name=beside", "checkpoint.asynchronous=true", "run.stop_grace_s=600"), straight.rows("straight")
    saves = runs.directory("beside") / "checkpoints"
    process = runs.held("saving 3", *options)
    wait_for(lambda: len(runs.rows("beside")) == 5 or process.poll() is not None)
    kill(process)
    assert not list(saves.glob("step_*")) and any(saves.glob(".step_000003.unfinished/*"))

    process = runs.held("saving 3", *options)
    wait_for(lambda: len(runs.rows("beside")) == 4 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert not list(saves.glob("step_*"))
    runs.let_go()
    _, printed = process.communicate(timeout=500)
    assert process.returncode == 75 and "Traceback" not in printed, printed
    stopped = runs.saved_rows("beside")
    assert len(stopped) >= 4 and (saves / "step_000003").is_dir() and not list(saves.glob(".step_*"))

    code, printed = runs.finish(*options, HELD)
    assert code == 0 and "Warning" not in printed, printed
    assert runs.rows("beside") == wanted
    runs.assert_went_on("beside", stopped)
    assert sorted(entry.name for entry in saves.iterdir())[-1] == "step_000006"


def test_the_checkpoints_with_the_best_evaluations_are_kept_besides_the_latest(runs):
    overrides = ("run.name=best", "eval.every=1", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=2")
    overrides += ("checkpoint.asynchronous=true",)  # each save waits for the one before, which may be one of the best
    code, printed = runs.finish(ONE_RANK, *overrides)
    assert code == 0, printed
    accuracy = {row["step"]: row["eval_accuracy"] for row in runs.rows("best")}
    best = sorted(accuracy, key=lambda step: (accuracy[step], step))[-2:]
    assert len(set(accuracy.values())) > 1 and min(best) < 6
    kept = sorted(entry.name for entry in (runs.directory("best") / "checkpoints").iterdir())
    assert kept == [f"step_{step:06}" for step in sorted({6, *best})]


def test_a_checkpoint_of_one_layout_resumes_in_another(runs, straight):
    shutil.copytree(straight.directory("straight"), runs.directory("moved"))
    shutil.rmtree(runs.directory("moved") / "checkpoints" / "step_000006")
    before = (runs.directory("moved") / "config.yaml").read_bytes()
    code, printed = runs.finish("run.name=moved", ONE_RANK, "run.seed=2")
    assert code == 2 and "run.seed was 1 and is 2" in printed
    assert (
        len(list(runs.directory("moved").glob("*.yaml"))) == 1
        and (runs.directory("moved") / "config.yaml").read_bytes() == before
    )
    code, printed = runs.finish("run.name=moved", "parallel.tp=1", "parallel.pp=2")
    assert code == 0 and "parallel.tp (2 -> 1); parallel.pp (1 -> 2)" in printed, printed
    assert (runs.directory("moved") / "config.step_000004.yaml").read_bytes() == before
    assert load_config(runs.directory("moved") / "config.yaml", []).parallel.pp == 2
    moved, unmoved = runs.rows("moved"), straight.rows("straight")
    assert [row["step"] for row in moved] == [1, 2, 3, 4, 5, 6] and moved[4] != unmoved[4]
    for key in ("reward_mean", "entropy", "loss", "grad_norm"):
        assert [row[key] for row in moved] == pytest.approx([row[key] for row in unmoved], abs=2e-4), key
    code, printed = runs.finish("run.name=moved", "parallel.tp=1")
    assert code == 0 and "moved: all run.steps=6 steps are done; raise run.steps to continue" in printed
    assert runs.rows("moved") == moved


def test_a_run_of_adapters_goes_on_bit_for_bit_from_checkpoints_without_other_weights(runs):
    overrides = (ONE_RANK, "lora.rank=4", "train.lr=3e-3", "eval.every=0", "checkpoint.every=2", "objective.kl_coef=0.01")
    code, printed = runs.finish("run.name=adapters", "run.steps=4", *overrides)
    assert code == 0, printed
    whole = runs.rows("adapters")
    assert all(row["logprob_gap_max"] < 1e-4 for row in whole) and whole[3]["kl"] > whole[0]["kl"] > 0
    for steps in (2, 4):
        code, printed = runs.finish("run.name=halves", f"run.steps={steps}", *overrides)
        assert code == 0, printed
    assert runs.rows("halves") == whole
    code, printed = runs.finish("run.name=halves", "run.steps=6", *overrides, "lora.alpha=8")
    assert code == 2 and "was written with lora.rank=4, lora.alpha=32.0" in printed
    assert runs.rows("halves") == whole


def test_a_reward_function_that_always_fails_stops_the_run_with_its_reason(runs):
    code, printed = runs.finish("run.name=failing", ONE_RANK, "eval.every=0", "reward.function=tests.rewards:always_fails")
    assert code == 2 and "Traceback" not in printed
    assert "24 of 24 answers could not be graded" in printed and "KeyError" in printed


def test_a_reward_outside_its_range_stops_the_run_and_what_was_trained_is_saved(runs):
    own = ("run.name=outside", "eval.every=0", "checkpoint.every=0")
    code, printed = runs.finish(*own, "--nproc", "2", "reward.function=tests.rewards:doubled_after_30_answers")
    assert code == 2 and "Traceback" not in printed
    told = (
        r"error: \d+ of 24 answers got a reward outside the configured range; the first, to problem \S+: "
        r"tests\.rewards:doubled_after_30_answers returned 2\.0, outside "
        r"reward\.range_min = 0\.0 to reward\.range_max = 1\.0; set these two to the lowest"
    )
    assert re.search(told, printed), printed
    saved = runs.saved_rows("outside")
    assert 1 <= len(saved) < 6
    code, printed = runs.finish(*own, ONE_RANK)
    assert code == 0, printed
    runs.assert_went_on("outside", saved)


def test_a_loss_whose_gradient_is_nan_on_one_rank_stops_the_run_and_says_where(runs):
    loss = ("objective.loss=tests.broken_loss:root_of_zero", "objective.options={rank: 1}")
    code, output = runs.finish("run.name=broken", "--nproc", "2", "parallel.tp=1", *loss)
    assert code == 2 and "Traceback" not in output
    assert re.search(
        r"the gradient of objective.loss tests.broken_loss:root_of_zero with respect to logp is not finite although all of its "
        r"inputs are: position 0 in the response of sample \S+, on rank 1\n",
        output,
    )
    assert not runs.rows("broken")


def test_a_loss_that_fails_stops_the_run_with_a_sentence_and_its_own_traceback(runs):
    options = ("run.name=failing", "eval.every=0", "parallel.tp=2")
    code, printed = runs.finish(*options, "objective.loss=tests.broken_loss:needs_an_option")
    assert code == 2, printed
    raised = "tests.broken_loss:needs_an_option raised KeyError: 'margin'"
    assert printed.count(f"error: objective.loss {raised}\nTraceback (most recent") == 1
    # The traceback shows the user's code only, down to its last frame.
    assert set(re.findall(r'File "(.*)", line', printed)) == {str(REPO / "tests" / "broken_loss.py")}, printed
    assert 'return options["margin"]' in printed
    assert raised in json.loads((runs.directory("failing") / "status.json").read_text())["message"]


def test_a_second_start_changes_nothing_of_a_run_that_runs_or_has_finished_without_checkpoints(runs):
    directory = RunDirectory(runs.directory("twice"))
    options = ("run.name=twice", ONE_RANK, "run.steps=1", "checkpoint.every=0", "eval.every=0")
    with directory.locked():
        directory.metrics.path.write_text('{"step": 1}\n{"step": 2}\n')
        code, printed = runs.finish(*options)
        assert code == 2 and "Traceback" not in printed
        assert printed.count(f"error: another process is running in {directory.root}; ") == 1
        assert directory.metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n'
        assert {path.name for path in directory.root.iterdir()} == {"lock", "metrics.jsonl"}
    code, printed = runs.finish(*options)
    assert code == 0, printed
    before = runs.rows("twice", times=True)
    assert [row["step"] for row in before] == [1] and "reward_mean" in before[0]
    code, printed = runs.finish(*options)
    assert code == 2 and "holds a finished run without a checkpoint" in printed
    assert runs.rows("twice", times=True) == before


def test_ctrl_c_ends_at_once_and_leaves_no_process(runs):
    process = runs.start("run.name=stopped", "run.steps=500")
    wait_for(lambda: len(runs.rows("stopped")) >= 1)
    members = family(process.pid)
    assert len(members) >= 5  # launcher, two ranks, two graders
    assert RunDirectory(runs.directory("stopped")).read_state() == "running"
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in printed
    assert_nobody_is_left(members)
    assert RunDirectory(runs.directory("stopped")).read_state() == "interrupted"


def test_an_evaluation_that_a_stop_came_before_is_made_up_for(runs, tmp_path, monkeypatch):
    """Otherwise the last evaluation, which shows the run's result, would be missing."""
    flag = tmp_path / "flag"
    monkeypatch.setenv("STOP_FLAG", str(flag))
    loss = ("objective.loss=tests.broken_loss:told_to_stop", "objective.options={call: 4}")
    options = (*loss, ONE_RANK, "run.steps=2", "eval.every=1", "checkpoint.every=0", "eval.samples=4", "eval.temperature=1.0")
    assert runs.finish("run.name=whole", *options)[0] == 0
    wanted = runs.rows("whole")
    assert all(row["eval_accuracy"] < row["eval_pass_at_k"] for row in wanted)
    assert wanted[0]["eval_accuracy_start"] < wanted[0]["eval_pass_at_k_start"] and "eval_pass_at_k_start" not in wanted[1]

    flag.touch()
    stopped = ("run.name=made_up_for", *options, "observe.tensorboard=true")
    code, printed = runs.finish(*stopped)
    assert code == 75, printed
    assert "before the weight sync of step" in printed
    assert "eval_accuracy" not in runs.rows("made_up_for")[-1]
    assert runs.finish(*stopped)[0] == 0
    assert runs.rows("made_up_for") == wanted
    assert runs.finish(*stopped)[0] == 0  # nothing is left to make up for
    assert runs.rows("made_up_for") == wanted


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes a small disk in a mount namespace of its own")
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_at_save_ends_with_one_sentence_and_keeps_the_last_checkpoint(runs, asynchronous):
    disk = runs.folder / "runs"
    disk.mkdir(exist_ok=True)
    # The disk is the test's own: it exists only for the launcher and its children, so results are listed from inside.
    script = (
        f'mount -t tmpfs -o size=1400k tmpfs "{disk}"; "$@"; code=$?; '
        f'ls -A "{disk}/full/checkpoints" "{disk}/full/checkpoints/step_000001"; exit $code'
    )
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, "bash")
    saves = ("checkpoint.every=1", "checkpoint.keep=5", f"checkpoint.asynchronous={asynchronous}")
    code, printed = runs.finish("run.name=full", ONE_RANK, *saves, prefix=prefix)
    assert code == 2, printed
    assert "checkpoints: no space left on the device while saving step 2" in printed
    assert "Traceback" not in printed
    assert "step_000001" in printed and "trainer.json" in printed and "unfinished" not in printed
