"""Every transport under NCCL's restrictions, with a stand-in on gloo ranks, as no machine with two GPUs was available."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from etr_megatron.weights import ServerLayout, TrainingLayout
from etr_megatron.weights.transport import version_directory
from tests.test_transport_disk import files_of
from tests.test_transport_sharded import check

JOB = "tests.nccl_like:run"


@pytest.mark.parametrize(
    ("family", "source", "destination"),
    [
        ("llama", TrainingLayout(pp=2), ServerLayout()),  # the first bucket is only of stage 0
        ("qwen2", TrainingLayout(tp=2), ServerLayout(tp=2)),
        ("qwen3_moe", TrainingLayout(dp=2, ep=2), ServerLayout(tp=2)),
    ],
)
def test_buckets_of_some_ranks_alone_arrive(gangs, hf_models, family, source, destination):
    model, layouts = hf_models[family], dict(source=source, destination=destination)
    found = gangs(source.world + destination.world).run(
        JOB, job="transport_jobs:sharded", model=model, **layouts, dtype=torch.float32, bucket_bytes=50_000
    )
    check(found, model, source, destination)


def test_files_that_some_ranks_write_alone_are_the_checkpoint(gangs, hf_models, tmp_path):
    model, source = hf_models["qwen3"], TrainingLayout(tp=2, pp=2)
    options = dict(directory=str(tmp_path), model=model, source=source, versions=[3], file_bytes=60_000)
    assert gangs(4).run(JOB, job="transport_jobs:write_to_disk", **options) == [3] * 4
    wanted, found = load_file(f"{model}/model.safetensors"), files_of(version_directory(tmp_path, 3))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_gathered_for_servers_is_the_checkpoint(gangs, hf_models):
    """The second stage has no part of the first bucket."""
    model = hf_models["qwen3"]
    found = gangs(4).run(JOB, job="transport_whole_jobs:whole", model=model, source=TrainingLayout(tp=2, pp=2), backend="nccl")
    tensors, wanted = found[0]["tensors"], load_file(f"{model}/model.safetensors")
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_hangs_while_all_connect_is_named_at_the_deadline(gangs, culprit):
    """NCCL itself would wait for it forever; for rank 0, in the store."""
    found = gangs(3).run(JOB, job="nccl_like:one_does_not_connect", culprit=culprit)
    for rank in {0, 1, 2} - {culprit}:
        error, seconds, aborted = found[rank]
        assert error.endswith(f"the opening of the weight sync did not complete: rank {culprit} did not arrive within 5 s")
        assert seconds < 40 and aborted == 1  # less than the minute for which it hangs


def test_ranks_that_wait_for_one_that_has_failed_end_with_its_reason(gangs, hf_models):
    layouts = dict(source=TrainingLayout(tp=2), destination=ServerLayout())
    found = gangs(3).run(JOB, job="transport_jobs:failing", model=hf_models["llama"], **layouts, culprit=1, fault="raise")
    for one in found:
        assert "rank 1 failed: OSError: the device fell off" in one["errors"][0]
        assert one["seconds"] < 50 and one["complete"] == [None, None] and one["after"] == 4
