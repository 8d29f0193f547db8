"""A real SGLang server on CPU: its log-probs, weight syncs from a tensor-parallel policy, and whole runs on it.

`bash tools/setup_env.sh --sglang` makes its environment; without it these tests are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks import weight_sync
from etr_megatron.config import SglangConfig
from etr_megatron.rollout.sglang import hosts
from etr_megatron.rollout.sglang.arguments import known_arguments
from etr_megatron.rollout.sglang.client import GenerateParameters
from etr_megatron.rollout.sglang.commands import server_command
from etr_megatron.rollout.sglang.hosts import Host, Started
from etr_megatron.rollout.sglang.watchdog import LEFT_BEHIND
from etr_megatron.weights import read_architecture
from tests import warm_run
from tests.fake_servers import servers
from tests.nodes import own_address
from tests.runs import REPO, wait_for
from tests.warm_servers import real_in_gangs, real_servers_start_warm

PYTHON = REPO / ".venv-sglang" / "bin" / "python"
LAUNCH = "tests/sglang_cpu/launch.py"
ARGUMENTS = (
    *("--device", "cpu", "--max-total-tokens", "4096", "--attention-backend", "torch_native"),
    *("--skip-server-warmup", "--disable-cuda-graph"),
)
OWN = dict(python=str(PYTHON), launch=(LAUNCH,), arguments=ARGUMENTS, mem_fraction=0.3)
PROMPTS = [[5, 6, 7], [9, 4], [100, 3, 250, 17, 60, 2]]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-sglang: `bash tools/setup_env.sh --sglang` makes it"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An intermediate size that TP x 32 divides: on CPU, SGLang pads others, and its workers' shapes then differ."""
    path = tmp_path_factory.mktemp("hf") / "qwen3"
    torch.manual_seed(3)
    sizes = dict(vocab_size=301, hidden_size=48, intermediate_size=128, head_dim=16, num_hidden_layers=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False)
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, initializer_range=0.1)).float().save_pretrained(path)
    return str(path)


@contextmanager
def started(config: SglangConfig, model: str, folder: Path, *, routing: bool = False) -> Iterator[Started]:
    """An external server, once it answers. It starts warm."""
    where = dict(place=0, host="127.0.0.1", folder=folder, api_key=None, cuda=False, routing=routing)
    host = Host({"server": server_command(config, Path(model), "float32", **where)}, folder, startup_timeout_s=1200.0)
    try:
        with real_servers_start_warm(config.python):
            found = host.start(["server"])["server"]
        assert found.problem is None, found.problem
        yield found
    finally:
        host.stop()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """One server for all transports; it starts with the checkpoint's weights, like an external one."""
    config = SglangConfig(**{**OWN, "arguments": (*ARGUMENTS, "--load-format", "auto")}, sync="sharded")
    with started(config, model, tmp_path_factory.mktemp("sglang")) as process:
        yield process


def test_a_server_tells_its_share_of_the_memory(server):
    assert hosts._share_of(SimpleNamespace(url=server.url, headers={})) == 0.3


def test_logprobs_are_those_of_the_tempered_distribution_before_top_p(server, model):
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sampling = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "ignore_eos": True}
    for prompt in PROMPTS:
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        reply = httpx.post(f"{server.url}/generate", json=body, timeout=300).json()
        ids = reply["output_ids"]
        with torch.no_grad():
            wanted = torch.log_softmax(reference(torch.tensor([prompt + ids])).logits[0].double() / 0.7, -1)
        for place, (logprob, token, _) in enumerate(reply["meta_info"]["output_token_logprobs"]):
            assert token == ids[place]
            assert logprob == pytest.approx(wanted[len(prompt) - 1 + place, token].item(), abs=1e-5)


def conversation(url: str) -> list[tuple[str, int, Any]]:
    """Route, status and JSON of all requests of a run except those with weights. One request is cut off."""
    found: list[Any] = []

    def ask(route: str, body: dict | None = None) -> None:
        place = len(found)
        found.append(None)  # keeps the order of requests, whichever is answered first
        reply = httpx.get(url + route, timeout=300) if body is None else httpx.post(url + route, json=body, timeout=300)
        found[place] = route, reply.status_code, reply.json() if reply.content.startswith(b"{") else {}

    def draw(tokens: int, **more: Any) -> dict[str, Any]:
        parameters = GenerateParameters(tokens, 1.0, 1.0, 0, seed=4, stop_ids=(300,), ignore_eos=True)
        sampling = parameters.as_json() | {"stop_token_ids": []}
        return {"input_ids": [5, 6], "sampling_params": sampling, "return_logprob": True, "logprob_start_len": -1, **more}

    for route in ("/openapi.json", "/model_info", "/server_info", "/health", "/v1/loads?include=core"):
        ask(route)
    ask("/generate", draw(3))
    ask("/generate", draw(3, input_ids=[5] * 600))  # longer than the model's context
    ask("/generate", draw(511))
    # Until it is long enough for a token, but not for all of them.
    for attempt, seconds in enumerate((0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)):
        place, rid = len(found), f"long{attempt}"
        long = threading.Thread(target=ask, args=("/generate", draw(400, rid=rid)))
        long.start()
        time.sleep(seconds)
        ask("/abort_request", {"rid": rid, "abort_all": False})
        long.join()
        if found[place][2]["output_ids"]:
            break
        del found[place:]
    for route in ("/flush_cache?timeout=30", "/release_memory_occupation", "/resume_memory_occupation"):
        ask(route, {})
    ask("/abort_request", {"rid": "nobody's", "abort_all": False})
    ask("/pause_generation", {"mode": "retract"})
    begin, end = "/begin_weight_update", "/end_weight_update"
    for route in (end, begin, begin, end, "/flush_cache"):
        ask(route, {})
    ask("/update_weight_version", {"new_version": "7", "abort_all_requests": False})
    ask("/model_info")
    ask("/continue_generation", {})
    return found


def assert_has(real: Any, fake: Any, where: str) -> None:
    """Whatever the fake's reply contains is in the real one, with the same type; for a list, its first element."""
    assert type(real) is type(fake) or {type(real), type(fake)} == {int, float} or fake is None, f"{where}: {real!r}, {fake!r}"
    if isinstance(fake, dict):
        for key, value in fake.items():
            assert key in real, f"{where}: no {key} in {sorted(real)}"
            assert_has(real[key], value, f"{where}/{key}")
    elif isinstance(fake, list) and fake:
        assert_has(real[0], fake[0], f"{where}[0]")


def test_the_server_that_other_tests_break_speaks_as_the_real_one_does(server):
    real = conversation(server.url)
    arguments = {"tp_size": 1, "dtype": "float32", "model_path": "", "quantization": None, "json_model_override_args": "{}"}
    model = {"model_path": "", "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    with servers({"tokens_per_s": 60, "says": {"/server_info": arguments, "/model_info": model}}) as (url,):
        fake = conversation(url)
    assert [(route, status) for route, status, _ in real] == [(route, status) for route, status, _ in fake]
    for (route, _, a), (_, _, b) in zip(real, fake, strict=True):
        assert_has(a, b, route)
    for said in (real, fake):
        replies = [reply for route, status, reply in said if route == "/generate" and status == 200]
        assert [one["meta_info"]["finish_reason"]["type"] for one in replies] == ["length", "abort"]
        for one in replies:
            assert [pair[1] for pair in one["meta_info"]["output_token_logprobs"]] == one["output_ids"]
        assert 0 < len(replies[1]["output_ids"]) < 400
        assert [reply["weight_version"] for route, _, reply in said if route == "/model_info"][1] == "7"
    refusals = [reply["message"] for route, status, reply in real if status == 400 and route != "/generate"]
    assert len(refusals) == 2 and "no weight-update session" in refusals[0] and "already open" in refusals[1]


def least_bytes(model: str, tp: int) -> int:
    """Bytes of a sync in fp32 that the workers of a server need: all norms, their share of everything else."""
    tensors = load_file(f"{model}/model.safetensors")
    return sum(tensor.nbytes * (tp if "norm" in name else 1) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("world", "layout", "sync"),
    [
        (1, [], "broadcast"),
        (2, ["parallel.tp=1", "parallel.pp=2"], "broadcast"),
        (2, ["parallel.tp=2"], "tensor"),
        (2, ["parallel.tp=1", "parallel.pp=2"], "disk"),
        (2, ["parallel.tp=2"], "sharded"),
    ],
)
def test_after_every_weight_sync_the_server_agrees_with_the_trainer(gangs, model, server, tmp_path, world, layout, sync):
    job = dict(model=model, directory=str(tmp_path), prompts=PROMPTS, overrides=layout)
    if sync == "tensor":  # with the real router as well
        job |= dict(python=str(PYTHON), router="cache_aware", router_launch=("tests/sglang_cpu/router.py",))
    if sync == "disk":  # a server that a killed job left in the middle of a sync
        for route in ("/pause_generation", "/begin_weight_update"):
            reply = httpx.post(server.url + route, json={"mode": "retract"} if "pause" in route else {})
            assert reply.status_code == 200 or (reply.status_code == 404 and "begin" in route)  # 404: before 0.5.21
    found = gangs(world).run("tests.sglang_jobs:gaps", urls=(server.url,), sync=sync, probe_every=1, **job)
    for rank in found:
        assert len(rank["gaps"]) == 2 and max(rank["gaps"]) < 1e-5
    if sync == "sharded":
        assert sum(rank["bytes"] for rank in found) == least_bytes(model, 1)


def test_the_weight_sync_benchmark_measures_syncs_that_bring_the_weights(model, server):
    buckets = list(weight_sync.buckets_of(read_architecture(model), load_file(f"{model}/model.safetensors"), 40_000))
    assert len(buckets) > 3
    seconds = asyncio.run(weight_sync.measure(server.url, buckets, 1))
    assert seconds.keys() == {"shared_memory", "text", "broadcast", "bare_copy"}
    assert all(len(each) == 1 and each[0] > 0 for each in seconds.values())


def over_two_nodes() -> dict[str, Any]:
    """Settings for a server of two tensor-parallel ranks, each started by the first rank of a node."""
    address = own_address()
    return {**OWN, **real_in_gangs(str(PYTHON)), "tp": 2, "nodes": "every", "nodes_per_server": 2, "address": address}


def test_every_worker_of_a_server_over_two_nodes_gets_its_shards_and_no_byte_more(gangs, model, tmp_path):
    """Each node starts one of its two processes, and only the first is asked; see tests/test_sglang_parts.py."""
    served = tmp_path / "config_alone"  # like a Megatron checkpoint, which has no weights that a server could read
    served.mkdir()
    shutil.copy(Path(model) / "config.json", served)
    job = dict(model=model, directory=str(tmp_path), prompts=PROMPTS, overrides=["parallel.tp=1", "parallel.pp=2"])
    found = gangs(2).run(
        "tests.sglang_jobs:gaps",
        deadline_s=1500.0,
        sync="sharded",
        served=str(served),
        probe_every=1,
        **over_two_nodes(),
        **job,
    )
    assert all(max(rank["gaps"]) < 1e-5 for rank in found)
    assert sum(rank["bytes"] for rank in found) == least_bytes(model, 2)


def ages_of(found: dict) -> list[int]:
    """Age of every token, in weight syncs before its step."""
    samples = [(version, one) for version, groups in found["steps"] for group in groups for one in group["samples"]]
    return [
        version - one_version
        for version, one in samples
        for one_version in one["weight_versions"] or [one["weight_version"]] * len(one["response_ids"])
    ]


@pytest.mark.parametrize(
    ("rollout", "idle_syncs"),
    [(dict(max_staleness=1), 0), (dict(max_staleness=2, partial=True, dynamic_sampling=True, max_oversample=3.0), 2)],
    ids=["ahead", "partial"],
)
def test_every_token_has_the_log_prob_of_the_weights_that_it_names(gangs, model, server, tmp_path, rollout, idle_syncs):
    sizes = dict(prompts_per_step=2, max_response_tokens=64)
    job = dict(model=model, directory=str(tmp_path), prompts=PROMPTS, urls=(server.url,), idle_syncs=idle_syncs)
    (found,) = gangs(1).run("tests.sglang_jobs:streamed", deadline_s=900.0, steps=5, rollout=rollout | sizes, **job)
    ids = [group["id"] for _, groups in found["steps"] for group in groups]
    assert len(ids) == len(set(ids)) == 10
    assert max(found["gaps"]) < 1e-5 and min(found["wrong"]) > 1e-3
    ages, counts = ages_of(found), found["counts"]
    assert min(ages) == 0 and max(ages) == max(count["staleness_max"] for count in counts) <= rollout["max_staleness"]
    if not idle_syncs:
        assert [count["staleness_max"] for count in counts] == [0, 1, 1, 1, 1]
        return
    assert sum(count["samples_continued"] for count in counts) > 0
    # Two extra syncs before the last step: whatever was begun before the last step but one is then too old.
    assert sum(count["groups_redone"] for count in counts) > 0
    dropped = {f"p{number}" for number in range(0, 40, 4)}
    assert sum(count["groups_dropped"] for count in counts) > 0 == sum(count["groups_filled"] for count in counts)
    assert not dropped & {name.split("@")[0] for name in ids}


def test_servers_that_die_or_hang_lose_no_sample_and_come_back_with_the_weights(gangs, model, tmp_path):
    job = dict(model=model, directory=str(tmp_path), prompts=PROMPTS, servers=2, address=own_address())
    job |= real_in_gangs(str(PYTHON))
    (found,) = gangs(1).run(
        "tests.sglang_comeback_jobs:killed_for_real", deadline_s=1500.0, probe_every=1, hang_timeout_s=5.0, **OWN, **job
    )
    assert found["failed"] == {"SGLang server 0": "gave no sign of life within 5 s"}
    assert found["failed_then"] == {} and list(found["failed_in_sync"]) == ["SGLang server 1"]
    assert found["lengths"] == [[found["tokens"]] * 4] * len(PROMPTS)
    assert found["keyless"] == [401]
    assert found["served"] == ["SGLang server 0"] and found["versions"] == ["2"]
    assert max(found["gaps"]) < 1e-5
    assert found["gone"].startswith("no SGLang server is left: SGLang server 0: /generate failed: ")


def test_the_server_says_what_arguments_it_has():
    known = known_arguments(str(PYTHON), (LAUNCH,))
    assert {"--attention-backend", "--mem-fraction-static", "--tp-size", "--custom-weight-loader", "--config"} <= known
    assert not {"--tp", "--no-such-argument"} & known


def processes_of(folder) -> list[int]:
    """Processes with a path in `folder` on their command line, or a file there open, as a server's log; their descendants."""
    found = set()
    for process in psutil.process_iter():
        try:
            paths = [*process.cmdline(), *(file.path for file in process.open_files())]
            if any(str(folder) in path for path in paths):
                found |= {process.pid, *(child.pid for child in process.children(recursive=True))}
        except psutil.Error:
            continue
    return sorted(found)


def test_a_run_on_servers_of_its_own_is_killed_without_a_trace_and_resumed(runs, monkeypatch):
    """Its server starts by its command, and warm when it resumes."""
    quoted = ",".join(f"'{argument}'" for argument in ARGUMENTS)
    options = [
        "run.name=served",
        "run.steps=3",
        "checkpoint.every=1",
        "eval.every=0",
        "parallel.tp=1",
        "rollout.backend=sglang",
        f"sglang.python={PYTHON}",
        f"sglang.launch=[{LAUNCH}]",
        f"sglang.arguments=[{quoted}]",
        "sglang.mem_fraction=0.3",
        "sglang.placement=colocated",
        "train.distributed_optimizer=true",
        "train.offload_for_rollout=true",
        "rollout.stop_strings=['1']",
    ]
    job = runs.start(*options)
    try:
        wait_for(lambda: bool(runs.saved_rows("served")), deadline_s=1500.0)
        pids = processes_of(runs.folder)
        assert len(pids) >= 5  # rank, graders, watchdog, server, scheduler, ...
        loads = {file.path for pid in pids for file in psutil.Process(pid).open_files() if file.path.startswith(LEFT_BEHIND)}
        assert len(loads) == 1
    finally:
        job.kill()
        job.communicate()
    wait_for(lambda: not processes_of(runs.folder) and not any(map(psutil.pid_exists, pids)), poll_s=0.2)
    assert not any(map(os.path.exists, loads))
    saved = runs.saved_rows("served")
    for name, value in warm_run.environment(str(PYTHON)).items():
        monkeypatch.setenv(name, value)
    code, output = runs.finish(*options, warm_run.REWARD, deadline_s=1500.0)
    assert code == 0, output
    assert [row["step"] for row in runs.rows("served")] == [1, 2, 3]
    runs.assert_went_on("served", saved)
    shown = [path.read_text().splitlines() for path in runs.directory("served").glob("rollouts/*.jsonl")]
    responses = [json.loads(line)["response"] for lines in shown for line in lines]
    assert any("1" in one for one in responses) and not any("1" in one[:-1] for one in responses)
    wait_for(lambda: not processes_of(runs.folder), deadline_s=60.0, poll_s=0.2)  # graders may end after the ranks
