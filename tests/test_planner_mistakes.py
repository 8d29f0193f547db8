"""An impossible plan ends in one sentence and exit code 2. If a plan does not fit, it names the part that does not."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from etr_megatron.checks import check_inputs
from etr_megatron.config import load_config
from etr_megatron.errors import UserError
from etr_megatron.planner import make_plan, render
from etr_megatron.planner.dry_run import dry_run, fewest_gpus

REPO = Path(__file__).resolve().parents[1]
CONFIG = REPO / "configs" / "qwen3_8b_8gpu.yaml"
MATH_7B, QWEN_32B, FLASH, DEEPSEEK = (
    str(CONFIG.with_name(f"{name}.yaml"))
    for name in ("qwen2.5_math_7b_8gpu", "qwen2.5_32b_32gpu", "glm4.7_flash_16gpu", "deepseek_v3_256gpu")
)
EIGHT = ["sglang.tp=8", "sglang.servers=1", "sglang.dp_attention=1"]
SHARES = ["sglang.mem_fraction=0.8", "sglang.servers=3", "sglang.tp=1", "parallel.tp=4"]


def tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of tools/plan.py."""
    monkeypatch.setattr("sys.argv", ["plan.py", "--config", str(CONFIG), "--gpus", "8", *arguments])
    return runpy.run_path(str(REPO / "tools" / "plan.py"))["main"]()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu-memory", "nan"], "--gpu-memory nan: must be a number of GiB greater than 0"),
        (["--gpu-memory", "inf"], "--gpu-memory inf: must be"),
        (["--gpu-memory", "0"], "--gpu-memory 0: must be"),
        (["--gpu-memory", "-80"], "--gpu-memory -80: must be"),
        (["--mean-prompt", "0"], "--mean-prompt 0: must be greater than 0 and at most data.max_prompt_tokens = 1024"),
        (["--mean-response", "nan"], "--mean-response nan: must be greater than 0"),
        (["--mean-response", "9000"], "at most rollout.max_response_tokens = 8192"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: must be at least 1"),
        (["--gpus", "100000000"], "--gpus 100000000: must be at most 65536"),
        (["--gpu", "a100", "fp8.recipe=blockwise"], "fp8.recipe=blockwise: an A100 SXM has no FP8"),
        (["fp8.recipe=mxfp8"], "fp8.recipe=mxfp8: an H100 SXM has no MXFP8; set fp8.recipe=blockwise"),
        (["--gpu", "a100", "sglang.fp8=true"], "sglang.fp8=true: an A100 SXM has no FP8"),
        (["train.lrr=1"], "did you mean train.lr?"),
        (["--config", "none.yaml"], "none.yaml cannot be read"),
        (["model.path=" + "m" * 300], "File name too long"),
        (["train.moe_aux_loss_coef=0.01"], "has no experts, so train.moe_aux_loss_coef has no effect"),
        (["--config", MATH_7B, "sglang.servers=1", "sglang.tp=8"], "28 attention heads, which sglang.tp=8 does not divide"),
        (
            ["--config", QWEN_32B, "--gpus", "32", "sglang.servers=1", "sglang.tp=5", "sglang.fp8=true"],
            "cannot be split as configured",
        ),
        (["--config", FLASH, "--gpus", "16", "parallel.tp=8"], "20 attention heads, which parallel.tp=8 does not divide"),
        (["--config", FLASH, "--gpus", "16", *EIGHT], "20 attention heads, which sglang.tp=8 does"),
        (
            ["--config", DEEPSEEK, "--gpus", "512", "parallel.cp=2", "parallel.cp_comm=a2a"],
            "has values of 128 dimensions and keys of 192, for which Transformer Engine does not have parallel.cp_comm=a2a",
        ),
        (["sglang.tp=3"], "need 24 GPUs on a node, which has 8"),
        (
            ["--config", DEEPSEEK, "--gpus", "136"],
            "error: invalid configuration on 8 ranks (136 GPUs less 128 of sglang.dedicated_nodes=16), 1 problem:\n",
        ),
        (
            [*("--gpus", "16", "sglang.placement=dedicated", "sglang.nodes=every", "sglang.sync=broadcast"), *SHARES],
            "error: invalid configuration on 10 ranks (16 GPUs less 6 of dedicated servers), 1 problem:\n",
        ),
        (["parallel.tp=3"], "error: invalid configuration on 8 ranks (all 8 GPUs), "),
    ],
)
def test_a_number_or_name_that_cannot_be_meant_is_one_sentence_and_exit_code_2(monkeypatch, capsys, arguments, told) -> None:
    assert tool(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and told in said.err


def test_the_time_of_what_does_not_fit_is_told_as_what_it_would_be(monkeypatch, capsys) -> None:
    few = ["rollout.prompts_per_step=4", "rollout.samples_per_prompt=2"]
    for arguments, code, title in (([], 0, "SXM (assumptions: "), (["--gpu-memory", "55"], 1, "SXM, if it fit (assumptions: ")):
        assert tool(monkeypatch, *few, *arguments) == code
        text = capsys.readouterr().out
        assert f"\nestimate of a step on H100 {title}" in text
    unfit = [line for line in text.splitlines() if ", does not fit" in line]
    assert unfit and all(line.endswith(" GiB, does not fit") for line in unfit)
    assert tool(monkeypatch, *few, "--gpu-memory", "55", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["time"]["step"] > 0 and told["fits"] is False


def test_numbers_that_cannot_be_meant_are_told_all_at_once(monkeypatch, capsys) -> None:
    assert tool(monkeypatch, "--gpus", "0", "--gpus-per-node", "0", "--gpu-memory", "0", "--mean-prompt", "0") == 2
    options = [line.removeprefix("error: ").split(" ")[0] for line in capsys.readouterr().err.splitlines()]
    assert options == ["--gpus", "--gpus-per-node", "--gpu-memory", "--mean-prompt"]
    with pytest.raises(UserError, match=r"^--gpus-per-node 0: must be at least 1\n--gpu-memory 0: must be"):
        dry_run(["--config", str(CONFIG), "--gpu-memory", "0", "--gpus-per-node", "0"])


def test_a_mistake_that_no_number_of_gpus_mends_is_told_as_such() -> None:
    for arguments, told in (
        (["model.path=models/Nobody-1B"], "^model.path: "),
        (["--gpu-memory", "0"], "^--gpu-memory 0: "),
        (["--gpu", "h1000"], "^--dry-run: argument --gpu: invalid choice: 'h1000'"),
        (["--nproc", "2"], "^--dry-run starts no processes: give --gpus"),
    ):
        with pytest.raises(UserError, match=told):
            dry_run(["--config", str(CONFIG), *arguments])


def test_a_context_that_is_too_short_is_the_same_sentence_in_a_plan_and_in_a_job(hf_models) -> None:
    overrides = [f"model.path={hf_models['qwen3']}", "data.max_prompt_tokens=100", "rollout.max_response_tokens=500"]
    config = load_config(None, [*overrides, "parallel.tp=1", "sglang.tp=1"])
    said = []
    for check in (lambda: check_inputs(config, 1), lambda: make_plan(config, 1, gpus_per_node=1)):
        with pytest.raises(UserError) as caught:
            check()
        said.append(str(caught.value))
    short = "has a context of 512 tokens (max_position_embeddings), fewer than data.max_prompt_tokens=100 plus "
    assert said == [f"{hf_models['qwen3']} {short}rollout.max_response_tokens=500; lower one of them"] * 2


def test_a_plan_of_a_replay_says_that_it_counts_rollouts() -> None:
    settings = [], ["rollout.replay=runs/a", "eval.every=0"]
    plain, replay = (render(make_plan(load_config(CONFIG, more), 8)) for more in settings)
    note = "rollout.replay needs neither this memory"
    assert note in replay and note not in plain


def test_servers_that_do_not_fit_are_not_blamed_on_the_ranks() -> None:
    few = ["rollout.prompts_per_step=4", "rollout.samples_per_prompt=2"]  # fewer, for a faster estimate
    config = load_config(CONFIG, ["sglang.mem_fraction=0.15", *few])
    plan = make_plan(config, 8)
    assert plan.ranks_fit and not plan.fits
    text = render(plan)
    assert "\nranks fit: rank" in text and "\nservers DO NOT FIT: weights take 15.3 of a pool of 12.0 GiB" in text
    assert text.endswith("\nno estimate of a step: servers without room for a sample generate nothing")
    assert plan.as_dict()["time"] is None
    with pytest.raises(UserError, match=r"on 1024: a server's weights take 15\.3 of a pool of 12\.0 GiB"):
        fewest_gpus(config)


@pytest.mark.parametrize(("fraction", "fits"), [("0.65", True), ("0.75", False), ("null", True)])
def test_the_graphs_of_servers_on_gpus_of_their_own_count_beside_a_pool_that_is_given(fraction: str, fits: bool) -> None:
    """20.5 GiB of graphs and 1.5 of a process leave 54 of 76 usable GiB, two thirds of the GPU."""
    apart = ["sglang.placement=dedicated", "sglang.nodes=first", "sglang.dedicated_nodes=1", "sglang.sync=broadcast"]
    servers = ["sglang.servers=1", "sglang.tp=8", "sglang.dp_attention=8", f"sglang.mem_fraction={fraction}"]
    few = ["sglang.arguments=[]", "rollout.prompts_per_step=4", "train.offload_for_rollout=false"]
    plan = make_plan(load_config(FLASH, [*apart, *servers, *few]), 24)
    assert plan.server_fits == fits and plan.as_dict()["time"] is not None
    told = "\nservers DO NOT FIT: pool of 60.0 and CUDA graphs of 20.5 GiB, with its process, take 82.0 of 76.0 usable GiB; "
    assert (told in render(plan)) != fits
