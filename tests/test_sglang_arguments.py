"""Arguments of servers: names checked against those that the server accepts, and those derived from the job's settings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from etr_megatron.config import Config, SglangConfig, TrainConfig, validate
from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.arguments import check_arguments, known_arguments
from etr_megatron.rollout.sglang.commands import LOADER, server_command
from etr_megatron.rollout.sglang.places import new_key, own_address_of

HELP = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--attention-backend", "--backend", choices=["a", "b"], help="see --not-an-argument, there is none")
parser.add_argument("--x", help="short enough to be explained on its line, unlike --neither-is-this")
parser.parse_args()
"""
LAUNCH = ("-c", HELP)


def with_arguments(*arguments: str, **settings) -> SglangConfig:
    return SglangConfig(python=sys.executable, launch=LAUNCH, arguments=arguments, **settings)


@pytest.fixture(autouse=True)
def forget():
    known_arguments.cache_clear()


def test_the_names_are_those_that_the_server_says():
    assert known_arguments(sys.executable, LAUNCH) == {"--help", "--attention-backend", "--backend", "--x"}


def test_an_unknown_argument_is_refused_with_the_closest_name():
    check_arguments(with_arguments("--attention-backend", "a", "--x=--anything"))
    with pytest.raises(
        UserError, match=r"sglang\.arguments: the server has no argument --atention-backend; did you mean --att"
    ):
        check_arguments(with_arguments("--x", "1", "--atention-backend=a"))


def test_nothing_is_asked_without_arguments_or_servers_to_start():
    check_arguments(SglangConfig(python="nowhere", arguments=()))
    check_arguments(SglangConfig(python="nowhere", urls=("http://a:1",), arguments=("--y",)))


@pytest.mark.parametrize("python", ["nowhere/python", sys.executable])
def test_a_server_that_cannot_be_asked_is_refused(python):
    with pytest.raises(UserError, match=r"sglang\.python: .*(does not exist|--help` failed: ValueError: broken)"):
        known_arguments(python, ("-c", "raise ValueError('broken')"))


def test_the_answer_is_remembered_until_another_version_is_installed(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "  --asked-$(wc -l < "$0.count")"; echo >> "$0.count"\n')
    python.chmod(0o755)
    (tmp_path / "bin" / "python.count").touch()
    package = tmp_path / "lib" / "python3.11" / "site-packages" / "sglang-0.5.21.dist-info"
    package.mkdir(parents=True)

    def ask(*launch: str) -> set[str]:
        known_arguments.cache_clear()
        return set(known_arguments(str(python), launch))

    assert ask("-m", "a") == {"--asked-0"} == ask("-m", "a")
    package.rename(package.with_name("sglang-0.5.22.dist-info"))
    assert ask("-m", "a") == {"--asked-1"}
    assert ask("-m", "b") == {"--asked-2"}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(arguments=("--port=1",)), ": --port is set by the job"),
        (dict(arguments=("--weight-version", "x")), ": --weight-version is set by the job"),
        (dict(arguments=("--tp-size", "2")), ": --tp-size is set by the job, see sglang.tp"),
        (dict(arguments=("--speculative-algorithm", "NEXTN")), "weight syncs send no weights of a draft model"),
        (dict(arguments=("--mem-fraction-static", "0.5"), mem_fraction=0.5), "--mem-fraction-static is given twice"),
        (dict(mem_fraction=1.0), "must lie between 0 and 1"),
        (dict(tp=4, ep=3), "ep must divide tp"),
        (dict(placement="external"), "external servers need their addresses in sglang.urls"),
        (dict(placement="colocated", urls=("http://a:1",)), "servers at sglang.urls are external"),
        (dict(placement="colocated", sync="broadcast"), "set sync to tensor or disk for colocated servers"),
        (dict(urls=("http://a:1",), sync="sharded"), "sharded needs servers that the job starts"),
        (dict(arguments=("--enable-eplb",), sync="sharded"), "--enable-eplb moves experts away from where sharded writes them"),
        (dict(arguments=("--ep-num-redundant-experts=2",), sync="sharded"), "moves experts away"),
        (dict(checksums=True), "checksums need sync to be sharded"),
        (dict(urls=("http://a:1",), router="random"), "the job starts a router only for servers that it also starts"),
        (dict(urls=("http://a:1",), nodes="every"), "the job does not place servers at sglang.urls"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, problem):
    found = validate(replace(Config(), sglang=SglangConfig(**settings)), 2)
    assert len(found) == 1 and problem in found[0]


def test_a_router_and_routing_replay_are_refused_together():
    config = replace(Config(), sglang=SglangConfig(router="cache_aware"), train=TrainConfig(routing_replay=True))
    (problem,) = validate(config, 2)
    assert problem.startswith(
        'sglang.router = "cache_aware", train.routing_replay = true: sglang-router (0.3.2) does not forward'
    )


def test_experts_that_move_are_no_trouble_where_servers_place_them_themselves():
    for sync in ("broadcast", "tensor", "disk"):
        settings = SglangConfig(arguments=("--enable-eplb", "--init-expert-location", "trivial"), sync=sync)
        assert validate(replace(Config(), sglang=settings), 2) == []


def command_of(tmp_path: Path, api_key: str | None = None, place: int = 0, cuda: bool = True, **settings):
    config = SglangConfig(**settings)
    return server_command(
        config, tmp_path, "bfloat16", place=place, host="10.0.0.7", folder=tmp_path, api_key=api_key, cuda=cuda
    )


def value_of(arguments: tuple[str, ...], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_a_server_is_told_to_say_which_experts_it_chose_where_that_is_asked(tmp_path):
    where = dict(place=0, host="10.0.0.7", folder=tmp_path, api_key=None, cuda=False)
    asked, plain = (server_command(SglangConfig(), tmp_path, "bfloat16", **where, routing=routing) for routing in (True, False))
    assert set(asked.arguments) - set(plain.arguments) == {"--enable-return-routed-experts"}


@pytest.mark.parametrize(
    ("shared", "sync", "given", "told"),
    [
        (None, "sharded", (), True),
        (None, "broadcast", (), False),
        (1, "sharded", (), True),
        (1, "broadcast", (), False),
        (2, "broadcast", (), True),
        (1, "sharded", ("--enforce-shared-experts-fusion",), False),
    ],
)
def test_a_shared_expert_has_parameters_of_its_own_where_the_sync_needs_them(tmp_path, shared, sync, given, told):
    for family in ("glm4_moe", "glm4_moe_lite", "deepseek_v3"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "n_shared_experts": shared}))
        arguments = command_of(tmp_path, sync=sync, arguments=given).arguments
        assert ("--disable-shared-experts-fusion" in arguments) == told
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert "--disable-shared-experts-fusion" not in command_of(tmp_path, sync=sync, arguments=given).arguments


def test_settings_become_arguments_and_the_users_come_last(tmp_path):
    sizes = dict(tp=4, ep=2, dp_attention=4, mem_fraction=0.7, context_length=4096)
    command = command_of(tmp_path, **sizes, place=1, devices=tuple("01234567"), arguments=("--x", "1"))
    arguments = command.arguments
    wanted = {"--tp-size": "4", "--ep-size": "2", "--dp-size": "4", "--mem-fraction-static": "0.7", "--context-length": "4096"}
    assert {name: value_of(arguments, name) for name in wanted} == wanted
    assert arguments[-2:] == ("--x", "1") and value_of(arguments, "--load-format") == "dummy"
    assert "--enable-dp-attention" in arguments
    assert not {"--enable-dp-attention", "--dp-size"} & set(command_of(tmp_path, tp=4).arguments)
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "4,5,6,7" and command.host == "10.0.0.7"


def test_the_share_of_a_server_on_a_ranks_gpu_is_found_when_it_is_started(tmp_path):
    alone, beside = (command_of(tmp_path, placement=how, mem_fraction=0.5) for how in ("dedicated", "colocated"))
    assert value_of(alone.arguments, "--mem-fraction-static") == "0.5" and alone.memory is None
    assert "--mem-fraction-static" not in beside.arguments and beside.memory == 0.5
    assert beside.shares_gpus and not alone.shares_gpus
    assert set(beside.environment) - set(alone.environment) == {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"}
    assert command_of(tmp_path, placement="colocated").memory is None


@pytest.mark.parametrize(
    ("capability", "model", "settings", "wanted"),
    [
        ((10, 0), {}, dict(fp8=True), ["--fp8-gemm-backend", "triton"]),
        ((10, 3), {"num_experts": 8}, {}, ["--moe-runner-backend", "triton"]),
        ((10, 0), {"num_local_experts": 8}, dict(fp8=True), ["--fp8-gemm-backend", "triton", "--moe-runner-backend", "triton"]),
        ((10, 0), {"n_routed_experts": 8}, {}, ["--moe-runner-backend", "triton"]),
        ((9, 0), {"num_experts": 8}, dict(fp8=True), []),
        ((10, 0), {"model_type": "deepseek_v3", "quantization_config": {"a": 1}}, {}, ["--quantization", "unquant"]),
        ((10, 0), {"model_type": "deepseek_v3"}, {}, []),
        ((9, 0), {"model_type": "deepseek_v3", "quantization_config": {"a": 1}}, {}, []),
        ((10, 0), {}, {}, []),
        ((10, 0), {}, dict(fp8=True, arguments=("--fp8-gemm-backend=cutlass",)), ["--fp8-gemm-backend=cutlass"]),
    ],
)
def test_servers_on_blackwell_keep_weights_as_they_are_sent(tmp_path, monkeypatch, capability, model, settings, wanted):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    (tmp_path / "config.json").write_text(json.dumps(model))
    arguments = command_of(tmp_path, **settings).arguments
    words = ("triton", "--quantization", "unquant")
    assert [word for word in arguments if "-backend" in word or word in words] == wanted


@pytest.mark.parametrize(
    ("settings", "ranks", "wanted"),
    [
        (dict(placement="colocated", servers=4, tp=2), "8", ["0,1", "2,3", "4,5", "6,7"]),
        (dict(servers=2, tp=2), "4", ["4,5", "6,7"]),  # dedicated
        (dict(servers=2, tp=4, dedicated_nodes=1), "8", ["0,1,2,3", "4,5,6,7"]),
        (dict(placement="colocated", devices=("7", "5"), servers=2), "8", ["7", "5"]),
    ],
    ids=["colocated", "dedicated", "whole node", "named"],
)
def test_servers_of_a_machine_have_different_gpus(tmp_path, monkeypatch, settings, ranks, wanted):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    places = range(settings["servers"])
    found = [command_of(tmp_path, place=place, **settings).environment["CUDA_VISIBLE_DEVICES"] for place in places]
    assert found == wanted


def test_servers_take_their_gpus_from_those_that_the_job_may_use(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,3,5")
    assert command_of(tmp_path).environment["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(UserError, match="need 2 GPUs besides those of 2 ranks, but this machine has 3; lower"):
        command_of(tmp_path, tp=2)
    with pytest.raises(UserError, match=r"sglang\.tp=4 need 4 GPUs, but this machine has 3; lower one of the two$"):
        command_of(tmp_path, tp=4, placement="colocated")
    assert "CUDA_VISIBLE_DEVICES" not in command_of(tmp_path, tp=4, cuda=False).environment


def test_a_server_on_a_ranks_own_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    with pytest.raises(UserError, match=r"names GPU 4, on which one of the 8 ranks of this machine trains; start only 4"):
        command_of(tmp_path, tp=4, devices=("4", "5", "6", "7"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_of(tmp_path, tp=4, devices=("4", "5", "6", "7")).environment["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"


def test_fp8_is_asked_for_in_blocks(tmp_path):
    override = json.loads(value_of(command_of(tmp_path, fp8=True).arguments, "--json-model-override-args"))
    assert override["quantization_config"]["quant_method"] == "fp8"
    assert override["quantization_config"]["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("fp8", [False, True])
def test_how_a_model_is_stored_does_not_decide_how_it_is_served(tmp_path, fp8):
    stored = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    override = json.loads(value_of(command_of(tmp_path, fp8=fp8).arguments, "--json-model-override-args"))
    assert (override["quantization_config"] or {}).get("weight_block_size") == ([128, 128] if fp8 else None)
    (tmp_path / "config.json").write_text("{}")
    assert ("--json-model-override-args" in command_of(tmp_path, fp8=fp8).arguments) == fp8


def test_overrides_of_the_users_own_do_not_silently_replace_those_of_the_job(tmp_path):
    own = ("--json-model-override-args", '{"rope_theta": 1}')
    assert command_of(tmp_path, arguments=own).arguments[-2:] == own
    with pytest.raises(UserError, match=r"override-args would replace .* \(quantization_config\); change .*config"):
        command_of(tmp_path, arguments=own, fp8=True)


PUBLISHED = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "deepseek_v3"}, PUBLISHED),
        (
            {"model_type": "deepseek_v3", "moe_layer_freq": 1},
            {name: PUBLISHED[name] for name in ("topk_method", "scoring_func")},
        ),
        ({"model_type": "deepseek_v3", **PUBLISHED}, None),
        ({"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense", "dense", "sparse"]}, {"first_k_dense_replace": 2}),
        ({"model_type": "glm4_moe_lite"}, {"first_k_dense_replace": 1}),
        ({"model_type": "glm4_moe_lite", "first_k_dense_replace": 0}, None),
        ({"model_type": "glm4_moe"}, None),
    ],
)
def test_a_server_is_told_what_transformers_does_not_write(tmp_path, config, told):
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = command_of(tmp_path).arguments
    assert ("--json-model-override-args" in arguments) == (told is not None)
    assert told is None or json.loads(value_of(arguments, "--json-model-override-args")) == told
    blocks = json.loads(value_of(command_of(tmp_path, fp8=True).arguments, "--json-model-override-args"))
    assert {name: value for name, value in blocks.items() if name != "quantization_config"} == (told or {})


def test_memory_is_given_up_on_gpus_alone(tmp_path):
    assert "--enable-memory-saver" in command_of(tmp_path, placement="colocated").arguments
    assert "--enable-memory-saver" not in command_of(tmp_path, placement="colocated", cuda=False).arguments


def test_a_sharded_server_finds_this_package_and_nothing_else_of_the_trainers(tmp_path):
    command = command_of(tmp_path, sync="sharded")
    assert value_of(command.arguments, "--custom-weight-loader") == LOADER
    folder = Path(command.environment["PYTHONPATH"].split(":")[0])
    assert [path.name for path in folder.iterdir()] == ["etr_megatron"]
    assert (folder / "etr_megatron" / "weights" / "transport" / "server_loader.py").is_file()


def test_an_api_key_is_in_a_file_that_only_the_user_reads(tmp_path):
    command = command_of(tmp_path, api_key="s3cret")
    assert "s3cret" not in " ".join(command.arguments) and "s3cret" not in str(command.environment)
    file = Path(value_of(command.arguments, "--config"))
    assert file.stat().st_mode & 0o077 == 0 and file.suffix == ".yaml" and '"s3cret"' in file.read_text()


def test_no_api_key_of_a_run_can_be_taken_for_an_option():
    keys = {new_key(["127.0.0.1", "10.0.0.7"]) for _ in range(1000)}
    assert len(keys) == 1000 and all(key.isalnum() and len(key) == 64 for key in keys)
    assert new_key(["127.0.0.1", "127.0.0.2"]) is None


@pytest.mark.parametrize(
    ("settings", "addresses", "nodes", "wanted"),
    [
        ({}, {0: "127.0.0.1"}, 1, "127.0.0.1"),
        ({}, {0: "127.0.0.1"}, 2, "node7"),  # ranks of another node send to servers of this one
        ({}, {0: "10.0.0.1", 4: "10.0.0.2"}, 2, "node7"),
        ({"urls": ("http://127.0.0.1:1",)}, {}, 1, "127.0.0.1"),
        ({"urls": ("http://127.0.0.1:1",), "host": "10.1.1.1"}, {}, 1, "10.1.1.1"),
    ],
)
def test_rank_0_is_found_where_servers_and_other_ranks_can_reach_it(monkeypatch, settings, addresses, nodes, wanted):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    assert own_address_of(SglangConfig(**settings), addresses) == wanted


@pytest.mark.slow
def test_a_run_with_an_unknown_argument_ends_before_anything_is_started(runs):
    launch = f"sglang.launch=[{json.dumps('-c')},{json.dumps(HELP)}]"
    options = ["rollout.backend=sglang", f"sglang.python={sys.executable}", launch, "sglang.arguments=['--atention-backend=a']"]
    code, output = runs.finish(*options)
    assert code == 2 and output.strip().splitlines()[-1] == (
        "error: sglang.arguments: the server has no argument --atention-backend; did you mean --attention-backend?"
    )
    assert not (runs.directory("small") / "servers").exists()


def test_parts_of_a_server_are_told_apart_and_meet_at_the_addresses_that_the_job_knows(tmp_path, monkeypatch):
    monkeypatch.setenv("HOST_IP", "10.9.9.9")  # of the machine, as Kubernetes sets it: not always one that a container has
    config = SglangConfig(tp=6, ep=3, nodes_per_server=3, devices=("1", "0"))
    where = dict(place=0, folder=tmp_path, api_key=None)
    for part in range(3):
        command = server_command(config, tmp_path, "bfloat16", host=f"10.0.0.{part}", part=part, cuda=False, **where)
        assert (command.part, command.parts) == (part, 3)
        words = " ".join(command.arguments)
        assert f"--tp-size 6 --nnodes 3 --node-rank {part} --ep-size 3" in words
        assert command.environment["SGLANG_HOST_IP"] == f"10.0.0.{part}"
        assert command.environment["CUDA_VISIBLE_DEVICES"] == "1,0"
    alone = server_command(SglangConfig(), tmp_path, "bfloat16", host="10.0.0.1", cuda=False, **where)
    assert "--nnodes" not in alone.arguments and "SGLANG_HOST_IP" not in alone.environment and alone.parts == 1


def test_only_servers_on_cpu_sleep_while_they_have_nothing_to_do(tmp_path):
    where = dict(place=0, host="127.0.0.1", folder=tmp_path, api_key=None)
    for cuda in (False, True):
        command = server_command(SglangConfig(), tmp_path, "bfloat16", cuda=cuda, **where)
        assert ("--sleep-on-idle" in command.arguments) is not cuda
