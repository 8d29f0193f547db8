"""Nodes dedicated to servers: which ones they are, and what is required of them and of the config."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from etr_megatron import launch, train
from etr_megatron.checks import check_inputs, check_server_node, dedicated_nodes, nodes_per_server, starts_servers
from etr_megatron.config import load_config, resolve
from etr_megatron.errors import UserError
from etr_megatron.platform.world import NodeRole, node_role
from etr_megatron.preflight import __main__ as preflight

FAKE = (f"sglang.python={sys.executable}", "sglang.launch=[-m,tests.fake_sglang]")


def torchrun(monkeypatch, *, nodes: int, processes: int, node: int, world: int | None = None) -> None:
    """The environment that torchrun gives a process."""
    said = {"WORLD_SIZE": nodes * processes if world is None else world, "LOCAL_WORLD_SIZE": processes}
    said |= {"GROUP_WORLD_SIZE": nodes, "GROUP_RANK": node}
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))


def test_the_last_nodes_are_set_apart_and_the_others_are_a_world_without_them(monkeypatch):
    for node, apart in enumerate((None, None, None, 0, 1)):
        torchrun(monkeypatch, nodes=5, processes=4, node=node)
        assert node_role(2) == NodeRole(12, apart)
    assert node_role(0) == NodeRole(20, None)


def test_without_torchrun_a_process_is_a_world_of_its_own(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert node_role(0) == NodeRole(1, None)
    with pytest.raises(UserError, match=r"dedicated_nodes=1: the job has 1 node, of which at least one must be left to train"):
        node_role(1)


def test_nodes_of_different_sizes_and_too_few_nodes_are_refused(monkeypatch):
    torchrun(monkeypatch, nodes=2, processes=4, node=0)
    with pytest.raises(UserError, match=r"dedicated_nodes=2: the job has 2 nodes"):
        node_role(2)
    torchrun(monkeypatch, nodes=2, processes=4, node=0, world=7)
    with pytest.raises(UserError, match=r"7 processes on 2 nodes, 4 of them on this node"):
        node_role(1)


def test_where_every_node_has_a_part_of_a_server_of_three_the_nodes_are_a_multiple_of_three(monkeypatch):
    options = ["rollout.backend=sglang", "sglang.nodes_per_server=3", "sglang.tp=6", "eval.every=0"]
    every, apart, embedded, replay = (
        load_config("configs/cpu_tiny.yaml", [*options, *more])
        for more in (
            ["sglang.nodes=every"],
            ["sglang.dedicated_nodes=3"],
            ["sglang.nodes=every", "rollout.backend=embedded"],
            ["sglang.nodes=every", "rollout.replay=runs/recorded"],
        )
    )
    torchrun(monkeypatch, nodes=6, processes=2, node=4)
    assert node_role(dedicated_nodes(every), nodes_per_server(every)) == NodeRole(12, None)
    torchrun(monkeypatch, nodes=7, processes=2, node=0)
    with pytest.raises(
        UserError, match=r"^sglang\.nodes_per_server=3: the job has 7 nodes, no multiple of it; start torchrun on"
    ):
        node_role(dedicated_nodes(every), nodes_per_server(every))
    assert node_role(dedicated_nodes(apart), nodes_per_server(apart)) == NodeRole(8, None)  # four nodes train
    assert nodes_per_server(embedded) == nodes_per_server(replay) == 1


def test_a_job_on_nodes_that_servers_do_not_divide_is_refused_however_it_is_started(monkeypatch, capsys):
    options = ["rollout.backend=sglang", "sglang.nodes_per_server=2", "sglang.tp=2", "sglang.nodes=every"]
    assert launch.main(["configs/cpu_tiny.yaml", *options]) == 2
    told = "sglang.nodes_per_server=2: the job has 1 node, no multiple of it; start torchrun on a multiple (--nnodes)"
    assert capsys.readouterr().err.startswith(f"error: {told}")
    torchrun(monkeypatch, nodes=3, processes=1, node=0)
    monkeypatch.setenv("ETR_PLATFORM", "cpu")
    monkeypatch.setattr("etr_megatron.preflight.__main__.require_torchrun", lambda _module: None)
    for run in (train._run, preflight._run):
        with pytest.raises(UserError, match=r"^sglang\.nodes_per_server=2: the job has 3 nodes, no multiple of it"):
            run(["configs/cpu_tiny.yaml", *options])


def test_only_the_nodes_set_apart_start_servers(monkeypatch):
    options = ["rollout.backend=sglang", "sglang.dedicated_nodes=1", "eval.every=0"]
    config = load_config("configs/cpu_tiny.yaml", options)
    found = []
    for node in range(3):
        torchrun(monkeypatch, nodes=3, processes=1, node=node)
        found.append(starts_servers(config))
    assert found == [False, False, True]
    for without in (["rollout.backend=embedded"], ["rollout.replay=runs/recorded"]):
        assert dedicated_nodes(load_config("configs/cpu_tiny.yaml", [*options, *without])) == 0


def test_one_machine_cannot_set_itself_apart(capsys):
    assert launch.main(["configs/cpu_tiny.yaml", "rollout.backend=sglang", "sglang.dedicated_nodes=1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: sglang.dedicated_nodes=1: the job has 1 node, of which at least one must be left to train")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("sglang.sync=tensor", "tensor needs a rank on the servers' machine; set sync to broadcast, sharded or disk"),
        ("sglang.nodes=every", "servers are either on dedicated nodes or on every node"),
        ("sglang.placement=colocated", "dedicated nodes have no ranks to share GPUs with"),
        ("sglang.urls=[http://a:1]", "the job does not place servers at sglang.urls"),
        ("sglang.dedicated_nodes=-1", "must be at least 0"),
    ],
)
def test_what_contradicts_nodes_for_servers_alone_is_refused(setting, told):
    with pytest.raises(UserError) as refusal:
        load_config("configs/cpu_tiny.yaml", ["rollout.backend=sglang", "sglang.dedicated_nodes=1", setting])
    assert told in str(refusal.value) and str(refusal.value).startswith("invalid configuration, 1 problem:")


def test_a_node_set_apart_needs_its_servers_environment_and_no_data_and_may_come_back_to_a_run_under_way(monkeypatch, tmp_path):
    torchrun(monkeypatch, nodes=2, processes=1, node=1)
    options = ["rollout.backend=sglang", "sglang.dedicated_nodes=1", f"run.dir={tmp_path}", "run.name=used"]
    options += ["checkpoint.resume=false", f"data.train={tmp_path / 'none.jsonl'}"]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text("{}")
    there = resolve(load_config("configs/cpu_tiny.yaml", [*options, *FAKE]), 1, cuda=False)
    check_server_node(there, 1)
    with pytest.raises(UserError, match=r"none\.jsonl(.|\n)*holds an earlier run"):
        check_inputs(there, 1)
    missing = dataclasses.replace(there.sglang, python="none", arguments=("--trust-remote-code",))
    with pytest.raises(UserError, match="none"):
        check_server_node(dataclasses.replace(there, sglang=missing), 1)
