"""How long ranks wait for each other in a weight sync, and which rank their errors name, on fake servers."""

from __future__ import annotations

import pytest

from tests.fake_servers import servers
from tests.test_sglang_engine import OWN, check_sums


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.tp=1"], ["parallel.tp=1", "parallel.pp=2"]], ids=["dp2", "pp2"])
def test_a_rank_that_holds_nothing_of_the_buckets_waits_as_long_as_they_take(gangs, hf_models, tmp_path, layout):
    """Every bucket meets its deadline; all together take longer than a rank otherwise waits for another."""
    with servers({"seconds_per_bucket": 0.4}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), overrides=layout, urls=urls, sync="tensor")
        job |= dict(update_timeout_s=6, bucket_bytes=1 << 15)
        found = gangs(2).run("tests.sglang_sync_jobs:slow_delivery", **job)[0]
    assert found["seconds"] > 6
    (state,) = found["states"].values()
    check_sums(state, found["sums"])


@pytest.mark.slow
def test_a_rank_that_is_late_is_named_after_the_deadline_of_every_wait(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), sync="broadcast", **OWN)
    first, _ = gangs(2).run("tests.sglang_sync_jobs:late_rank", **job)
    assert first.startswith(
        "SyncError: rank 0: the weight sync of version 2 did not complete: rank 1 did not arrive within 3 s"
    )


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["sharded", "broadcast"])
def test_a_rank_that_is_slow_to_ask_still_hears_why_rank_0_has_failed(gangs, hf_models, tmp_path, sync):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), sync=sync, **OWN)
    for error in gangs(2).run("tests.sglang_sync_jobs:rank0_fails", **job):
        assert error.startswith("SyncError") and "rank 0 failed: ValueError: shards of source rank 0 do not fit" in error


@pytest.mark.slow
@pytest.mark.parametrize("checksums", [True, False])
def test_with_checksums_a_server_that_holds_something_else_than_its_source_is_found(gangs, hf_models, tmp_path, checksums):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), checksums=checksums, **OWN)
    errors = gangs(2).run("tests.sglang_sync_jobs:corrupted", **job)
    if not checksums:
        assert errors == ["", ""]
    else:  # the server's own worker detected it, so the server has failed, and it was the last one
        assert all("pieces that differ from their source after the transfer: " in error for error in errors)
        assert all("sent by source rank 1" in error for error in errors)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_cannot_write_to_the_memory_of_its_node_is_named_on_every_rank(gangs, hf_models, tmp_path, culprit):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), sync="tensor", bucket_bytes=1 << 16, **OWN)
    ranks = gangs(2).run("tests.sglang_sync_jobs:host_fails", culprit=culprit, **job)
    for found in ranks:
        assert found["error"].startswith("SyncError") and f"rank {culprit} failed: RuntimeError: bus error" in found["error"]
        assert found["buckets"] == 2 and found["after_s"] < 50  # the deadline is 60
    assert ranks[0]["paused"] == [False, False]
