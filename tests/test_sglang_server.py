"""A real SGLang server on CPU: its log-probs, weight syncs from a tensor-parallel policy, and whole runs on it.

`bash tools/setup_env.sh --sglang` makes the environment that it runs in; without it these tests are skipped.
"""

from __future__ import annotations

import os
import signal
import time

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from etr_megatron.rollout.sglang.server import ServerCommand, ServerProcess
from tests.runs import REPO, wait_for

PYTHON = REPO / ".venv-sglang" / "bin" / "python"
LAUNCH = "tests/sglang_cpu/launch.py"
ARGUMENTS = (
    *("--device", "cpu", "--mem-fraction-static", "0.5", "--max-total-tokens", "4096", "--attention-backend", "torch_native"),
    *("--skip-server-warmup", "--disable-cuda-graph"),
)
PROMPTS = [[5, 6, 7], [9, 4], [100, 3, 250, 17, 60, 2]]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-sglang: `bash tools/setup_env.sh --sglang` makes it"),
]


@pytest.fixture(scope="module")
def server(hf_models, tmp_path_factory):
    arguments = ("--model-path", hf_models["qwen3"], "--dtype", "float32", "--skip-tokenizer-init", *ARGUMENTS)
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    process = ServerProcess("server", ServerCommand(str(PYTHON), (str(REPO / LAUNCH),), arguments), log)

    def answers() -> bool:
        assert process.is_running, process.last_words(40)
        try:
            return httpx.get(f"{process.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_for(answers, deadline_s=400.0, poll_s=0.5)
        yield process
    finally:
        process.stop()


def test_logprobs_are_those_of_the_tempered_distribution_before_top_p(server, hf_models):
    model = AutoModelForCausalLM.from_pretrained(hf_models["qwen3"], dtype=torch.float32).eval()
    sampling = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "ignore_eos": True}
    for prompt in PROMPTS:
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        reply = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
        ids = reply["output_ids"]
        with torch.no_grad():
            wanted = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0].double() / 0.7, -1)
        for place, (logprob, token, _) in enumerate(reply["meta_info"]["output_token_logprobs"]):
            assert token == ids[place]
            assert logprob == pytest.approx(wanted[len(prompt) - 1 + place, token].item(), abs=1e-5)


@pytest.mark.parametrize(("world", "layout"), [(1, []), (2, ["parallel.tp=2"]), (2, ["parallel.tp=1", "parallel.pp=2"])])
def test_after_every_weight_sync_the_server_agrees_with_the_trainer(gangs, hf_models, server, world, layout):
    job = dict(model=hf_models["qwen3"], url=server.url, prompts=PROMPTS, overrides=layout)
    for gaps in gangs(world).run("tests.sglang_jobs:gaps", **job):
        assert len(gaps) == 2 and max(gaps) < 1e-5


def processes_of(folder) -> list[int]:
    """Everything that was started with a path in `folder`, or by somebody who was."""
    found = set()
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()):
                found |= {process.pid, *(child.pid for child in process.children(recursive=True))}
        except psutil.Error:
            continue
    return sorted(found)


def test_a_run_on_servers_of_its_own_is_killed_without_a_trace_and_resumed(runs):
    quoted = ",".join(f"'{argument}'" for argument in ARGUMENTS)
    options = [
        "run.name=served",
        "run.steps=4",
        "checkpoint.every=2",
        "eval.every=0",
        "rollout.backend=sglang",
        f"sglang.launch=[{LAUNCH}]",
        f"sglang.arguments=[{quoted}]",
    ]
    job = runs.start(*options, start_new_session=True)
    try:
        wait_for(lambda: len(runs.rows("served")) >= 2, deadline_s=500.0)
        wait_for(lambda: any(runs.directory("served").glob("checkpoints/step_*/trainer.json")))
        pids = processes_of(runs.folder)
        assert len(pids) >= 6  # launcher, two ranks, watchdog, server, scheduler, ...
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
    wait_for(lambda: not processes_of(runs.folder) and not any(map(psutil.pid_exists, pids)), deadline_s=40.0)
    code, output = runs.finish(*options, deadline_s=500.0)
    assert code == 0, output
    assert [row["step"] for row in runs.rows("served")] == [1, 2, 3, 4]
    time.sleep(1)
    assert not processes_of(runs.folder)
