"""The GPU benchmark and the GPU tests without a GPU: everything in them except CUDA itself."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_device, gpu_head, gpu_policy, gpu_step
from etr_megatron.weights import Architecture
from tests import warm

CPU = torch.device("cpu")


@pytest.mark.slow
def test_all_parts_run_on_cpu_and_are_written(tmp_path, capsys, monkeypatch):
    for module in (gpu_policy, gpu_step):
        monkeypatch.setattr(module, "subprocess", warm.Subprocess)
    output = tmp_path / "new" / "result.json"
    embedded = ["--set", "rollout.backend=embedded"]  # so that the training step runs without a server
    code = gpu.main(
        ["--quick", "--device", "cpu", "--rounds", "3", *embedded, "--work", str(tmp_path), "--output", str(output)]
    )
    result, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert code == 0 and result["environment"]["torch"] == torch.__version__ and result["device"]["type"] == "cpu"
    (case,) = result["head"]["cases"]
    assert case["contestants"].keys() == {"torch", "products", "products_at_once"} and "triton" in case["left_out"]
    assert all(len(one["seconds"]) == 3 and one["min_s"] > 0 for one in case["contestants"].values())
    policy = result["policy"]
    assert policy["left_out"].keys() == set(gpu_device.RECIPES) and list(policy["recipes"]) == ["bf16", "bf16_recompute"]
    one = policy["recipes"]["bf16"]
    assert one["dtype"] == "float32" and one["mfu"] is None and one["logprob_gap_to_bf16"] == 0
    assert one["tokens_per_s"] == pytest.approx(6 * 48 / one["update"]["median_s"])
    assert len(set(one["losses"])) == 3  # it trains
    assert 0 < one["planned_state_bytes"] < one["planned_peak_bytes"] and one["runtime_bytes"] is None
    step = result["step"]
    assert [row["step"] for row in step["steps"]] == [1, 2] and step["median"]["time_train"] > 0
    assert "rollout.backend=embedded" in step["settings"]
    assert "head float32 T=300" in printed and "policy bf16 (float32)" in printed and "step, medians: time_step" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]  # checkpoints are deleted


def test_a_step_without_sglang_is_left_out_and_says_so(tmp_path):
    options = Namespace(quick=True, device="cpu", set=[], sglang_python=sys.executable)
    found = gpu_step.measure(options, tmp_path)
    assert found["left_out"] == f"{sys.executable} cannot import sglang"
    assert gpu_step.text(found) == f"step: left out, {sys.executable} cannot import sglang"


@pytest.mark.slow
def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_head, "measure", fail)
    monkeypatch.setattr(gpu_policy, "subprocess", warm.Subprocess)
    output = tmp_path / "result.json"
    options = ["--quick", "--device", "cpu", "--part", "head", "--part", "policy", "--set", "train.lrr=1"]
    assert gpu.main([*options, "--output", str(output)]) == 1
    result = json.loads(output.read_text())
    assert result["head"] == {"failed": "RuntimeError: out of memory"}
    assert result["policy"]["recipes"]["bf16"] == {"failed": "exit code 1"}
    assert "policy bf16: failed, exit code 1" in capsys.readouterr().out


def test_a_wrong_head_is_refused(monkeypatch):
    def doubled(problem, backend):
        gpu_head.products_at_once(problem)
        return right(problem, backend)

    right = gpu_head.head
    monkeypatch.setattr(gpu_head, "head", doubled)
    with pytest.raises(gpu_head.WrongResultError, match=r"^torch: d_weight differs from autograd"):
        gpu_head.measure((13, 24, 91), 1, CPU)


def test_products_are_the_heads_three():
    problem = gpu_head.make_problem(384, 24, 91, torch.float32, CPU)
    gpu_head.products(problem)
    (buffer, grad), (grad_hidden, _) = problem.scratch["products"], problem.scratch["hidden"]
    weight, hidden = problem.weight.detach(), problem.hidden.detach()
    torch.testing.assert_close(buffer, hidden[256:] @ weight.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_hidden, torch.cat([grad, grad, grad]) @ weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(problem.weight.main_grad, grad.t() @ hidden.view(3, 128, 24).sum(0), rtol=1e-4, atol=1e-4)


def test_the_target_is_in_bf16_of_the_backend_that_runs_by_default():
    def case(dtype, **seconds):
        return {"dtype": dtype, "contestants": {name: {"median_s": one} for name, one in seconds.items()}}

    (target,) = gpu_head.targets(case("bfloat16", torch=1.5, triton=1.2, products=1.0))
    assert target.value == 1.2 and target.met
    (target,) = gpu_head.targets(case("bfloat16", torch=1.31, products=1.0))
    assert not target.met
    assert gpu_head.targets(case("float32", torch=1.0, products=1.0)) == []


def test_flops_are_those_of_every_product_three_times():
    arch = Architecture("qwen3", 2, 6, 10, 4, 2, 3, 11, False, 1e-6, 64)
    matrices = 2 * (6 * 12 + 2 * 6 * 6 + 12 * 6 + 3 * 6 * 10)
    attention = sum(2 * 2 * 4 * 3 * seen for seen in range(1, 8)) * 2  # scores and values: position t attends to t + 1 keys
    wanted = 3 * 5 * (2 * matrices * 7 + attention + 2 * 6 * 11 * 4)
    assert gpu_policy.flops_of_update(arch, {"samples": 5, "prompt": 3, "response": 4}) == wanted


def test_the_slice_is_qwen3_8b():
    published = json.loads((Path(gpu.ROOT) / "configs" / "models" / "Qwen3-8B" / "config.json").read_text())
    differing = {key for key, value in gpu_policy.QWEN3_8B.items() if published.get(key, value) != value}
    assert not differing and published["num_hidden_layers"] == 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--device", "cpu", "--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--quick", "--device", "cpu", "--layers", "-1"], "--layers is -1; it must be at least 1"),
        (["--device", "cpu"], "--device cpu takes the sizes of --quick alone; add it"),
        (["--quick", "--device", "cpu", "--output", "/dev/null/x.json"], "--output /dev/null/x.json cannot be written"),
        (["--part", "tail"], "invalid choice: 'tail'"),
    ],
)
def test_wrong_options_exit_with_2_and_one_sentence(capsys, arguments, message):
    try:
        code = gpu.main(arguments)
    except SystemExit as exit_:  # raised by argparse
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and "Traceback" not in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_says_what_runs_instead(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith(
        "this machine has no CUDA device; --quick --device cpu goes through the same code"
    )


def gpu_tests(**environment: str) -> str:
    """Runs tests/gpu, which must pass, and returns pytest's output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "tests/gpu"]
    env = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    done = warm.start(command, env)
    said, _ = done.communicate(timeout=600)
    assert done.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_gpu_tests_are_skipped_here_for_one_reason():
    printed = gpu_tests()
    assert set(re.findall(r"^SKIPPED .*: (.*)$", printed, re.MULTILINE)) == {"needs a CUDA device"}
    assert re.fullmatch(r"\d+ skipped in .*", printed.splitlines()[-1])


@pytest.mark.slow
def test_the_gpu_tests_themselves_work_on_cpu_where_they_can():
    last = gpu_tests(ETR_GPU_TESTS_DRY_RUN="1", ETR_PLATFORM="cpu").splitlines()[-1]
    assert int(re.search(r"(\d+) passed", last)[1]) > 25 and "failed" not in last
