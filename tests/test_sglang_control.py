"""Warnings of rank 0, and modules that it must not import, if the config has servers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from etr_megatron.config import SglangConfig
from etr_megatron.rollout.sglang.connections import allow_connections
from etr_megatron.rollout.sglang.control import Control
from etr_megatron.rollout.sglang.fits import Expected
from etr_megatron.weights import read_architecture
from tests.runs import REPO

TRAINING = """
import sys
from pathlib import Path
from etr_megatron.config import load_config
import etr_megatron.train, etr_megatron.job, etr_megatron.rollout.sglang
from etr_megatron.rollout.sglang.arguments import check_arguments
assert load_config("configs/cpu_tiny.yaml", ["sglang.tp=2", "sglang.placement=colocated"]).rollout.backend == "embedded"
for path in sorted(Path("configs").glob("*.yaml")):
    load_config(path)
check_arguments(load_config("configs/cpu_tiny_sglang.yaml", ["sglang.arguments=[]"]).sglang)
print([name for name in sys.modules if name.split(".")[0] in ("sglang", "sglang_router")])
"""


@pytest.mark.parametrize(
    ("placement", "backend", "is_said"),
    [("colocated", "gloo", True), ("colocated", "nccl", False), ("dedicated", "gloo", False)],
)
def test_that_colocated_servers_on_cpu_give_up_no_memory_is_said(hf_models, tmp_path, caplog, placement, backend, is_said):
    expected = Expected(read_architecture(hf_models["qwen3"]), "float32", 1, False)
    config = SglangConfig(placement=placement)
    control = Control(config, [], expected, host="127.0.0.1", api_key=None, backend=backend, logs=tmp_path)
    try:
        with caplog.at_level("WARNING"):
            control.open({})
    finally:
        control.close()
    said = "sglang.placement: colocated servers on CPU keep their memory while the policy trains"
    assert [record.getMessage() for record in caplog.records if "sglang" in record.getMessage()] == [said] * is_said


@pytest.mark.parametrize(
    ("urls", "key", "hosts"),
    [
        (("http://10.0.0.9:1", "http://127.0.0.1:2", "http://10.0.0.8:1", "http://10.0.0.9:3"), None, "10.0.0.9, 10.0.0.8"),
        (("http://10.0.0.9:1",), "secret", None),
        (("http://127.0.0.1:1", "http://localhost:2"), None, None),
        ((), None, None),
    ],
)
def test_that_servers_on_other_machines_have_no_key_is_said_once(hf_models, tmp_path, caplog, monkeypatch, urls, key, hosts):
    monkeypatch.delenv("ETR_SGLANG_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("ETR_SGLANG_API_KEY", key)
    expected, names = Expected(read_architecture(hf_models["qwen3"]), "float32", 1, False), list(map(str, range(len(urls))))
    with caplog.at_level("WARNING"):
        Control(SglangConfig(urls=urls), names, expected, host="127.0.0.1", api_key=None, backend="gloo", logs=tmp_path).close()
    said = (
        f"sglang.urls: anyone who can connect to {hosts} can replace the servers' weights; start them with --api-key, and set "
    )
    said += "ETR_SGLANG_API_KEY"
    assert [record.getMessage() for record in caplog.records] == [said] * (hosts is not None)


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "is_said"),
    [
        (1024, 2**19, 5120, False),
        (20000, 2**19, None, False),
        (1024, 4096, 4096, True),
        (1024, resource.RLIM_INFINITY, 5120, False),
    ],
)
def test_every_request_may_have_a_connection_and_what_the_system_does_not_allow_is_said(
    monkeypatch, caplog, soft, hard, raised, is_said
):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda what, both: limits.append((what, both)))
    allow_connections(4096)
    assert limits == ([] if raised is None else [(resource.RLIMIT_NOFILE, (raised, hard))])
    said = "sglang.concurrency: up to 4096 requests at a time need 5120 open files, but the system allows 4096"
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [said] * is_said


@pytest.mark.slow
def test_a_trainer_beside_an_installed_sglang_imports_nothing_of_it(tmp_path):
    for name in ("sglang", "sglang_router"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    run = subprocess.run(
        [sys.executable, "-c", TRAINING], cwd=REPO, env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "[]", run.stdout + run.stderr
