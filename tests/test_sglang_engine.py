"""The engine on all ranks, with processes that speak SGLang's protocol: transports, faults, nodes, keys."""

from __future__ import annotations

import sys

import httpx
import pytest

from tests.fake_servers import servers
from tests.nodes import own_address

SYNCS = ("broadcast", "tensor", "disk", "sharded")
OWN = {"python": sys.executable, "launch": ("-m", "tests.fake_sglang")}


def check_sums(state: dict, wanted: dict[str, float]) -> None:
    """By tensor; a sharded server has fused ones, whose padding is zero, so only the totals are comparable."""
    if state["sums"].keys() == wanted.keys():
        assert state["sums"] == pytest.approx(wanted, rel=1e-9, abs=1e-6)
    assert sum(state["sums"].values()) == pytest.approx(sum(wanted.values()), rel=1e-9, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "sync"), zip(["parallel.tp=2", "parallel.pp=2"] * 2, SYNCS, strict=True))
def test_every_transport_brings_all_weights_to_every_server(gangs, hf_models, tmp_path, layout, sync):
    overrides = ["parallel.tp=1", layout] if "pp" in layout else [layout]
    if sync == "disk":  # left by a killed run; the new one starts from an older checkpoint
        for number in (7, 8):
            folder = tmp_path / "weights" / f"version_{number:06d}"
            folder.mkdir(parents=True)
            (folder / "version.json").write_text(f'{{"version": {number}, "run": ""}}')
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), overrides=overrides, versions=(1, 2, 2), sync=sync)
    with servers({}, {}) as urls:
        found = gangs(2).run("tests.sglang_jobs:fake_sync", urls=urls, **job)[0]
    assert list(found["states"]) == ["SGLang server 0", "SGLang server 1"] and not found["failed"]
    for state in found["states"].values():
        check_sums(state, found["sums"])
        assert (state["sums"].keys() == found["sums"].keys()) == (sync != "sharded")
        assert state["version"] == "2" and not state["paused"]
    # It has deadlines of its own, whose errors name the server: no rank gives up before them.
    places = {place.split(".<locals>")[0] for place, _ in found["waits"]}
    assert {"SglangEngine.__init__", "SglangEngine._transaction", "SglangEngine.release"} < places
    assert any("Sender." in place for place in places) and all(is_long for _, is_long in found["waits"])
    if sync == "disk":
        assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["version_000001", "version_000002"]


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["broadcast", "disk"])
def test_servers_of_fp8_get_quantised_matrices_and_their_scales_by_the_names_of_published_checkpoints(
    gangs, hf_models, tmp_path, sync
):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), overrides=["parallel.tp=2"], sync=sync, fp8=True, **OWN)
    found = gangs(2).run("tests.sglang_jobs:fake_sync", **job)[0]
    (state,) = found["states"].values()
    assert state["sums"] == pytest.approx(found["sums"], rel=1e-9, abs=1e-6)
    scales = {name.removesuffix("_scale_inv") for name in state["sums"] if name.endswith("_scale_inv")}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"} < scales
    assert all(name.endswith("_proj.weight") and name in state["sums"] for name in scales)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "sync"),
    [*(("die_at_bucket", sync) for sync in SYNCS), *(("hang_at_bucket", sync) for sync in ("broadcast", "disk", "sharded"))],
)
def test_a_server_lost_in_the_middle_of_a_sync_does_not_cost_the_others_theirs(gangs, hf_models, tmp_path, what, sync):
    with servers({}, {what: 1}, {}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), overrides=["parallel.tp=2"], urls=urls, sync=sync)
        # Two syncs, as some transports have only one bucket in each. Others have many, and ranks continue with the next one.
        hangs = "SGLang server 1" if what == "hang_at_bucket" else ""
        found, other = gangs(2).run("tests.sglang_jobs:fake_sync", versions=(1, 2), hangs=hangs, bucket_bytes=1 << 16, **job)
    assert (found["metrics"]["servers_serving"], other["metrics"]) == (2, {})
    assert list(found["failed"]) == ["SGLang server 1"]
    assert list(found["states"]) == ["SGLang server 0", "SGLang server 2"]
    for state in found["states"].values():
        check_sums(state, found["sums"])
        assert state["version"] == "2" and not state["paused"]


@pytest.mark.slow
def test_a_server_whose_parameters_are_another_models_says_so_and_does_not_cost_the_others_their_shards(
    gangs, hf_models, tmp_path
):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), sync="sharded")
    why = "the server's parameters do not match the offer: there is no model.embed_tokens.weight; "
    with servers({}, {"misfit": True}) as urls:
        found = gangs(2).run("tests.sglang_jobs:fake_sync", overrides=["parallel.tp=2"], versions=(1, 2), urls=urls, **job)[0]
        assert list(found["failed"]) == ["SGLang server 1"] and found["failed"]["SGLang server 1"].startswith(why)
        (state,) = found["states"].values()
        check_sums(state, found["sums"])
        assert state["version"] == "2"
        (error,) = gangs(1).run("tests.sglang_jobs:refused", urls=urls[1:], **job)
        assert error.startswith(f"OtherModelError: {why}") and error.endswith("; or use another sglang.sync than sharded")
        assert httpx.get(urls[1] + "/health").status_code == 200


@pytest.mark.slow
def test_a_server_that_says_it_is_well_and_fails_at_every_sync_is_tried_at_growing_distances(gangs, hf_models, tmp_path):
    """Also a server that the job does not start: all ranks wait for it in the sync in which it fails."""
    with servers({}, {}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), urls=urls, server="SGLang server 1")
        (tried,) = gangs(1).run("tests.sglang_comeback_jobs:syncs_with", behaviours=[{"refuse_weights": True}] * 6, **job)
    assert tried == [1, 2, 4]


@pytest.mark.slow
def test_a_server_that_was_only_unwell_comes_back_at_the_first_sync_that_finds_it_well(gangs, hf_models, tmp_path):
    behaviours = [{"refuse_weights": True}, {"unwell": True}, {}, {}, {"unwell": False, "refuse_weights": False}, {}]
    with servers({}, {}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), urls=urls, server="SGLang server 1")
        (tried,) = gangs(1).run("tests.sglang_comeback_jobs:syncs_with", behaviours=behaviours, **job)
    assert tried == [1, 5, 6]


@pytest.mark.slow
def test_a_server_that_a_killed_job_left_in_the_middle_of_a_sync_serves_the_next_job(gangs, hf_models, tmp_path):
    """Such a server is paused, hence not healthy. A healthy one is not told to continue, as another job may be using it."""
    with servers({}, {}) as urls:
        for route in ("/pause_generation", "/begin_weight_update"):
            httpx.post(urls[1] + route, json={}).raise_for_status()
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), overrides=[], urls=urls)
        (found,) = gangs(1).run("tests.sglang_jobs:fake_sync", **job)
    assert [state["version"] for state in found["states"].values()] == ["1", "1"] and not found["failed"]
    untouched, left = (state["log"] for state in found["states"].values())
    assert untouched[:2] == ["/pause_generation", "/begin_weight_update"]
    assert left[2:6] == ["/end_weight_update", "/continue_generation", "/pause_generation", "/begin_weight_update"]


@pytest.mark.slow
def test_a_server_that_did_not_hear_the_end_of_a_sync_that_it_failed_at_is_brought_back(gangs, hf_models, tmp_path):
    behaviours = [{"refuse_weights": True}, {"refuse_weights": False, "in_update": True}, {}]
    with servers({}, {}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), urls=urls, server="SGLang server 1")
        (tried,) = gangs(1).run("tests.sglang_comeback_jobs:syncs_with", behaviours=behaviours, **job)
    assert tried == [1, 2, 3]


@pytest.mark.parametrize("sync", SYNCS)
def test_a_rank_that_fails_is_named_on_every_rank_and_servers_go_on(gangs, hf_models, tmp_path, sync):
    with servers({}) as urls:
        found = gangs(2).run(
            "tests.sglang_jobs:rank_fails", model=hf_models["qwen3"], directory=str(tmp_path), urls=urls, sync=sync
        )
    for error, _ in found:
        assert error.startswith("SyncError") and "did not complete: rank 1 failed: ValueError" in error
    (state,) = found[0][1].values()
    assert not state["paused"] and state["version"] == "default"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die_in", "stop_in"])
def test_a_server_that_is_killed_or_hangs_is_restarted_and_has_the_weights_before_it_serves(gangs, hf_models, tmp_path, how):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), servers=2, concurrency=4, request_timeout_s=4.0, **OWN)
    found = gangs(1).run("tests.sglang_comeback_jobs:killed_between", how=how, **job)[0]
    assert found["ids"] == [[[(i + 7 + k) % 97 for k in range(5)]] * (1 + 2 * (i % 2)) for i in range(30)]
    assert list(found["failed"]) == ["SGLang server 0"]
    assert {name: state["version"] for name, state in found["states"].items()} == dict.fromkeys(
        ("SGLang server 0", "SGLang server 1"), "2"
    )
    restarted = found["states"]["SGLang server 0"]["log"]
    assert restarted.count("/update_weight_version") == 2  # a new process, which took part in two syncs of three
    assert restarted.index("/update_weights_from_distributed") < restarted.index("/continue_generation")


@pytest.mark.slow
def test_servers_on_every_node_ask_for_a_key_that_only_the_job_knows(gangs, hf_models, tmp_path):
    address = own_address()
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), address=address, **OWN)
    job |= dict(cold=[1])  # its server has a command line
    found = gangs(2).run("tests.sglang_node_jobs:on_two_nodes", **job)[0]
    assert len(found["urls"]) == 2 and all(address in url for url in found["urls"])
    assert found["has_key"] and found["keyless"] == [401, 401]
    assert not found["on_command_line"] and found["readable"] == []
    for state in found["states"].values():
        check_sums(state, found["sums"])


@pytest.mark.slow
def test_on_loopback_servers_of_every_node_need_no_key(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), address="127.0.0.1", **OWN)
    found = gangs(2).run("tests.sglang_node_jobs:on_two_nodes", **job)[0]
    assert not found["has_key"] and found["keyless"] == [200, 200] and len(found["states"]) == 2


@pytest.mark.slow
def test_servers_of_every_node_find_weights_in_the_memory_of_their_own(gangs, hf_models, tmp_path):
    """Each gets segments that its node's rank made; on a node without room it gets the bytes, and a warning names the rank."""
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), address="127.0.0.1", sync="tensor", servers=2, tp=2, **OWN)
    ranks = gangs(2).run("tests.sglang_node_jobs:on_two_nodes", full=[1], syncs=3, bucket_bytes=1 << 16, **job)
    names = [f"SGLang server {number}" for number in range(4)]
    assert list(ranks[0]["states"]) == names
    for number, name in enumerate(names):
        state = ranks[0]["states"][name]
        check_sums(state, ranks[0]["sums"])
        assert state["version"] == "3"
        assert len([route for route in state["log"] if route == "/update_weights_from_tensor"]) > 3 * 3
        assert (state["most_payload_bytes"] > 1 << 16) == (number // 2 == 1)
    assert [found["segments"] for found in ranks] == [2, 0]
    room = f"no room for {ranks[0]['largest_mib']} MiB of weights"
    said = f"rank 1: /dev/shm has {room}; they are sent to its servers over HTTP"
    assert [one for one in ranks[0]["warnings"] if "/dev/shm" in one] == [said]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["beside_a_node_of_servers", "beside_a_slow_server"])
def test_ranks_wait_for_servers_longer_than_a_collective_may_take(gangs, hf_models, tmp_path, where):
    """For example on a node that hangs: only rank 0 communicates with it."""
    launch = "import runpy, sys, time; time.sleep(3); runpy.run_module('tests.fake_sglang', run_name='__main__')"
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), collective_s=2, python=sys.executable, launch=("-c", launch))
    found = gangs(2).run(f"tests.sglang_node_jobs:{where}", **job)[0]
    assert list(found["states"]) == ["SGLang server 0"]
    check_sums(found["states"]["SGLang server 0"], found["sums"])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["die_at_bucket", "hang_at_bucket"])
def test_a_server_of_another_node_that_is_lost_as_it_reads_its_nodes_memory_comes_back_with_the_next_weights(
    gangs, hf_models, tmp_path, what
):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), address="127.0.0.1", sync="tensor", **OWN)
    job |= dict(behaviours=[{}, {what: 1}], hangs="SGLang server 1", syncs=2, bucket_bytes=1 << 16)
    found = gangs(2).run("tests.sglang_node_jobs:on_two_nodes", **job)[0]
    assert [list(failed) for failed in found["failed"]] == [["SGLang server 1"], []]
    assert list(found["states"]) == ["SGLang server 0", "SGLang server 1"]
    for state in found["states"].values():
        check_sums(state, found["sums"])
        assert state["version"] == "2"


def test_colocated_servers_have_their_memory_back_before_a_sync(gangs, hf_models, tmp_path):
    routes = gangs(1).run("tests.sglang_jobs:colocated", model=hf_models["qwen3"], directory=str(tmp_path), **OWN)[0]
    first = [route for route in routes if any(word in route for word in ("memory", "generation", "_weights_", "flush"))]
    idle = "/flush_cache?timeout=30"
    # Also as soon as it has started: ranks build their models then.
    assert first[:3] == [idle, "/release_memory_occupation", "/resume_memory_occupation weights"]
    assert first[first.index("/continue_generation") + 1 :] == [
        idle,
        "/release_memory_occupation",
        "/resume_memory_occupation weights",
        "/pause_generation",
        "/update_weights_from_tensor",
        "/flush_cache",
        "/resume_memory_occupation kv_cache cuda_graph",
        "/flush_cache",
        "/continue_generation",
    ]


def test_ranks_leave_their_gpus_to_colocated_servers_in_every_sync(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), **OWN)
    (done,) = gangs(1).run("tests.sglang_sync_jobs:syncs_beside_a_server", **job)
    sync = ["empty cache", "due", "begin", "empty cache", "finish"]
    assert done == ["sync 1", *sync, "probe", "sync 2", *sync, "sync 3", *sync]


@pytest.mark.slow
def test_a_colocated_server_that_was_started_anew_is_not_told_to_take_back_what_it_has(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), **OWN)
    (versions,) = gangs(1).run("tests.sglang_jobs:colocated_restart", **job)
    assert versions == {"SGLang server 0": "3", "SGLang server 1": "3"}


@pytest.mark.slow
def test_a_healthy_server_is_not_started_again_unless_it_fails_repeatedly(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), **OWN)
    (found,) = gangs(1).run("tests.sglang_comeback_jobs:failed_between", **job)
    assert found == [("2", True), ("2", True), ("4", False)]  # at the second failure it waits for a sync


@pytest.mark.slow
def test_a_colocated_server_that_has_failed_holds_no_memory_while_ranks_train_and_comes_back(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), fails_after=[1, 2], **OWN)
    syncs, _ = gangs(2).run("tests.sglang_comeback_jobs:colocated_failures", **job)
    both, second = ["SGLang server 0", "SGLang server 1"], ["SGLang server 1"]
    # It is back at the next sync after its first failure, and at the one after that after its second.
    assert syncs == [[both, both, second], [both, both, second], [second, second, second], [both, both, both]]


def test_servers_whose_logprobs_are_not_the_trainers_are_refused(gangs, hf_models, tmp_path):
    with servers({}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), urls=urls, max_gap=1e-3)
        (error,) = gangs(1).run("tests.sglang_jobs:refused", **job)
    assert error.startswith("OtherModelError: SGLang server 0: after weight sync 1 its log-probs differ by ")
    assert "more than the 0.01 that rollout.max_logprob_gap=0.001 allows in a probe; it serves another model" in error


@pytest.mark.slow
def test_of_several_servers_the_one_with_other_logprobs_gets_no_more_until_a_sync_after_which_they_are_right(
    gangs, hf_models, tmp_path
):
    wrong_in_one_group = {"logprob": [-0.5, -0.9, -0.5], "says": {"/server_info": {"dp_size": 3}}}
    with servers({}, wrong_in_one_group, {"logprob": -0.508}) as urls:  # the last is off as bfloat16 may be
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), urls=urls, max_gap=1e-3, sync="disk")
        found, other = gangs(2).run("tests.sglang_sync_jobs:one_probed_wrong", **job)
    what = "after weight sync 1 its log-probs differ by 0.4 on average from the trainer's in its attention group 1"
    assert found["failed"] == [
        {"SGLang server 1": f"{what}, more than the 0.01 that rollout.max_logprob_gap=0.001 allows in a probe"},
        {},
    ]
    (first, wrong, third), after = found["prompts"]
    assert wrong == 3 and first + third == 2 + 12 and min(first, third) > 1  # it had only the probe's prompts
    assert after[1] > 6 and sum(after) == 2 * (5 + 12)
    assert found["served"] == other["served"] == 24


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["broadcast", "sharded"])
def test_servers_of_the_job_that_are_all_lost_in_a_sync_are_started_again_and_have_the_weights(
    gangs, hf_models, tmp_path, sync
):
    """Over NCCL, `broadcast` loses all of them with the first. For the other two see test_sglang_parts.py."""
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), sync=sync, **OWN)
    found = gangs(2).run("tests.sglang_comeback_jobs:all_are_lost", **job)[0]
    assert list(found["states"]) == ["SGLang server 0", "SGLang server 1"]
    for state in found["states"].values():
        check_sums(state, found["sums"])
        assert state["version"] == "1" and not state["paused"]


def test_servers_that_did_not_start_for_a_sync_are_not_started_twice_for_it(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), **OWN)
    ((error, attempts),) = gangs(1).run("tests.sglang_comeback_jobs:none_start", **job)
    assert "SGLang server 0: it does not start" in error and attempts == 1


def test_nothing_is_generated_from_random_weights(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), generate_first=True, probe_every=0, **OWN)
    (error,) = gangs(1).run("tests.sglang_jobs:refused", **job)
    assert error == "RuntimeError: servers have no weights before the first update_weights"


def test_a_server_that_does_not_start_is_refused_on_every_rank_with_the_end_of_its_log(gangs, hf_models, tmp_path):
    own = {**OWN, "launch": ("-c", "print('no such kernel'); raise SystemExit(3)")}
    for error in gangs(2).run("tests.sglang_jobs:refused", model=hf_models["qwen3"], directory=str(tmp_path), **own):
        assert error.startswith("UserError: SGLang server 0 ended while it started") and error.endswith("no such kernel")


@pytest.mark.parametrize("sync", ["broadcast", "sharded"])
def test_what_keeps_one_rank_from_starting_servers_is_an_error_on_every_rank(gangs, hf_models, tmp_path, sync):
    (tmp_path / "file").touch()
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path / "file" / "servers"), sync=sync, **OWN)
    first, second = gangs(2).run("tests.sglang_jobs:refused", **job)
    assert first.startswith("NotADirectoryError: ") and second.startswith("RuntimeError: rank 0 failed: [Errno 20] ")
