"""The log-prob benchmark: it rejects incorrect contestants, reports what it measured, and refuses invalid options."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from benchmarks import fresh_ranks, logprob, logprob_contestants, logprob_rank
from benchmarks.logprob_contestants import Contestant
from benchmarks.logprob_problem import make_problem
from benchmarks.logprob_report import table, targets
from benchmarks.targets import summary
from tests import warm
from tests.runs import REPO, wait_for

LOSSES = [name for name, one in logprob_contestants.CONTESTANTS.items() if one.has_loss and name != "megatron_core"]


def problem(dtype: torch.dtype = torch.float32):
    return make_problem(13, 24, 91, dtype, None)


def float64_results(p):
    """Loss and gradients written out by hand: softmax, ratio, clipping, entropy."""
    hidden, weight = p.hidden.detach().double(), p.weight.detach().double()
    log_p = torch.log_softmax(hidden @ weight.t(), 1)
    target = torch.nn.functional.one_hot(p.targets, len(weight)).double()
    logp, entropy = (log_p * target).sum(1), -(log_p.exp() * log_p).sum(1)
    ratio, advantage = (logp - p.old_logp).exp(), p.advantages.double()
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    bounded = torch.where(clipped, ratio.clamp(0.8, 1.2), ratio)
    loss = -(bounded * advantage + 0.01 * entropy).mean()
    g_logp = torch.where(clipped, 0.0, -ratio * advantage / len(ratio))[:, None]
    g_entropy = -0.01 / len(ratio)
    d_logits = g_logp * (target - log_p.exp()) - g_entropy * log_p.exp() * (log_p + entropy[:, None])
    assert clipped.any() and not clipped.all()
    return loss, d_logits @ weight, d_logits.t() @ hidden


@pytest.mark.parametrize("name", LOSSES)
def test_contestants_compute_the_loss_and_gradients_of_the_definition(name):
    p = problem()
    found = logprob_rank.results(logprob_contestants.CONTESTANTS[name], p)
    for key, expected in zip(("loss", "d_hidden", "d_weight"), float64_results(p), strict=True):
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-4, atol=1e-6)


def doubled_weight_gradient(p):
    logprob_contestants.gathered(p)
    p.weight.main_grad.mul_(2)
    return logprob_contestants.gathered(p)


def without_entropy(p):
    loss = p.token_loss(slice(None), torch.log_softmax(p.hidden @ p.weight.t(), 1).gather(1, p.targets[:, None])[:, 0], None)
    loss.backward()
    return loss.detach()


def not_a_number(p):
    return logprob_contestants.gathered(p) * math.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("wrong", "quantity"), [(doubled_weight_gradient, "d_hidden|d_weight"), (without_entropy, "loss"), (not_a_number, "loss")]
)
def test_a_wrong_contestant_is_refused_by_name_before_anything_is_timed(monkeypatch, wrong, quantity, dtype):
    timed = []
    monkeypatch.setitem(logprob_contestants.CONTESTANTS, "wrong", Contestant(wrong))
    monkeypatch.setattr(logprob_rank, "time_all", lambda *arguments: timed.append(arguments))
    job = {"kind": "time", "rounds": 1, "rows": 13, "hidden": 24, "vocab": 91, "dtype": str(dtype).removeprefix("torch.")}
    with pytest.raises(logprob_rank.WrongResultError, match=rf"^wrong: ({quantity}) differs from gathered"):
        logprob_rank.run_job({**job, "contestants": ["gathered", "wrong"]}, None)
    assert not timed


def test_weight_gradients_that_autograd_returns_are_added_once():
    p = problem()
    p.weight.main_grad.fill_(1.0)
    p.forget_gradients()
    without_entropy(p)
    p.collect_weight_gradient()
    alone = problem()
    without_entropy(alone)
    torch.testing.assert_close(p.weight.main_grad, 1.0 + alone.weight.grad)
    assert p.weight.grad is None


def test_peak_memory_is_what_a_pass_allocates_beyond_what_was_there():
    size = 48 << 20

    def allocate(p):
        torch.empty(size, dtype=torch.uint8).fill_(1)
        return torch.zeros(())

    earlier = torch.empty(2 * size, dtype=torch.uint8).fill_(1)  # an earlier, higher peak must not hide the pass
    del earlier
    assert logprob_rank.measure_peak(Contestant(allocate), problem()) == pytest.approx(size, rel=0.05)


def a_case(dtype="float32", **changed):
    figures = {
        "single_pass": (1.2, 25),
        "recompute": (1.5, 25),
        "gathered": (3.0, 500),
        "megatron_core": (1.3, 100),
        "shard_softmax": (1.4, 200),
        "gemms": (1.0, 100),
        "gemms_chunked": (1.1, 25),
        "gemms_ours": (1.05, 100),
        **changed,
    }
    contestants = {
        name: {**summary([0.5, seconds, 9.0]), "peak_bytes": peak, "errors": {}} for name, (seconds, peak) in figures.items()
    }
    sizes = {"tp": 2, "rows": 7, "hidden": 5, "vocab": 30}
    return {**sizes, "dtype": dtype, "contestants": contestants, "single_pass_formula_bytes": 24}


def verdicts(case):
    return {target.text: target.met for target in targets(case)}


def test_targets_are_met_or_missed_by_the_medians():
    assert all(verdicts(a_case()).values()) and len(verdicts(a_case())) == 4
    assert not verdicts(a_case(single_pass=(1.26, 25)))["time / gemms"]
    for other in ("gemms_chunked", "gemms_ours"):  # the floor is the fastest variant of the products
        assert not verdicts(a_case(**{other: (0.9, 25)}))["time / gemms"]
    assert not verdicts(a_case(megatron_core=(1.1, 100)))["time / megatron_core"]
    assert not verdicts(a_case(shard_softmax=(1.1, 200)))["time / shard_softmax"]
    assert not verdicts(a_case(single_pass=(1.2, 31)))["memory / megatron_core"]
    assert list(verdicts(a_case("bfloat16"))) == ["time / shard_softmax"]


def test_table_lists_contestants_by_time_and_every_verdict():
    text = table(a_case(single_pass=(1.2, 31)))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["gemms", "gemms_ours", "gemms_chunked", "single_pass"]
    assert lines[5].split()[1:5] == ["1.2000", "0.5000", "8.5000", "1.20"]
    assert "missed: single_pass memory / megatron_core = 0.31 (target <= 0.3)" in text and text.count("met:") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--tp", "-2"], "--tp is -2; it must be at least 1"),
        (["--tp", "2", "--size", "4,8,33"], "--size has a vocabulary of 33, which --tp 2 does not divide"),
        (["--size", "4,8"], "'4,8' is not three whole numbers T,H,V"),
        (["--size", "4,0,8"], "'4,0,8' has a number below 1"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--output", "/dev/null/x.json"], "--output /dev/null/x.json cannot be written"),
    ],
)
def test_wrong_options_exit_with_2_and_one_sentence(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(logprob, "measure", lambda *_: pytest.fail("it started to measure"))
    try:
        code = logprob.main(arguments)
    except SystemExit as exit_:  # raised by argparse
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and "Traceback" not in captured.err


def test_a_rank_that_fails_ends_the_others_and_the_run(capfd):
    job = {"kind": "memory", "contestants": ["no_such_one"], "dtype": "float32", "rows": 4, "hidden": 8, "vocab": 64}
    with pytest.raises(RuntimeError, match="a rank of the memory job of no_such_one failed"):
        logprob.run_ranks(job, 2)
    assert "KeyError: 'no_such_one'" in capfd.readouterr().err


@pytest.mark.slow
def test_quick_run_on_two_ranks_writes_what_it_measured_beside_what_was_there(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(fresh_ranks, "subprocess", warm.Subprocess)  # two ranks for each contestant
    output = tmp_path / "new" / "result.json"
    output.parent.mkdir()
    case = {"tp": 2, "dtype": "bfloat16", "rows": 40, "hidden": 24, "vocab": 1506, "contestants": {}}
    other = {**case, "tp": 1}
    output.write_text(json.dumps({"cases": [case, other]}))
    options = ["--quick", "--tp", "2", "--dtype", "bfloat16", "--size", "40,24,1506", "--rounds", "2"]
    assert logprob.main([*options, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert len(result["cases"]) == 2 and result["cases"][0] == other
    case = result["cases"][1]
    assert case["rounds"] == 2 and case["environment"]["torch"] == torch.__version__
    assert (case["tp"], case["dtype"], case["rows"], case["hidden"], case["vocab"]) == (2, "bfloat16", 40, 24, 1506)
    assert list(case["contestants"]) == list(logprob_contestants.CONTESTANTS)
    for name, one in case["contestants"].items():
        assert len(one["seconds"]) == 2 and 0 < one["min_s"] <= one["median_s"]
        assert one["peak_bytes"] > 0
        assert bool(one["errors"]) == (not name.startswith("gemms"))
        assert all(error <= 1e-2 for error in one["errors"].values())
    assert [target["text"] for target in case["targets"]] == ["time / shard_softmax"]
    assert "TP2 bfloat16 T=40 H=24 V=1506" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_stopped_leaves_no_process_and_no_temporary_file(tmp_path, number):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "benchmarks.logprob", "--quick", "--output", str(tmp_path / "found.json")]
    process = subprocess.Popen(
        command, cwd=REPO, env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for(lambda: any(temporary.iterdir()) and psutil.Process(process.pid).children())
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 128 + number and b"Traceback" not in told
    assert not any(temporary.iterdir()) and not psutil.wait_procs(ranks, timeout=120)[1]
