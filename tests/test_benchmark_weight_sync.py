"""The weight-sync benchmark without a server; its syncs are in test_sglang_server.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import weight_sync
from etr_megatron.weights import read_architecture, weights_of


@pytest.mark.parametrize("limit", [1, 40_000, 10**9])
def test_buckets_hold_every_tensor_once_and_at_most_the_limit_unless_they_hold_one_weight(hf_models, limit):
    tensors = load_file(f"{hf_models['qwen3_tied']}/model.safetensors")
    arch = read_architecture(hf_models["qwen3_tied"])
    parts = {name: len(weight.hf) for weight in weights_of(arch) for name in weight.hf}  # 3 for query, key and value
    buckets = list(weight_sync.buckets_of(arch, tensors, limit))
    assert sorted(name for bucket in buckets for name in bucket.names) == sorted(tensors)
    for bucket in buckets:
        assert len(bucket.flat) <= limit or len(bucket.names) == parts[bucket.names[0]]
        for field in bucket.fields:
            assert torch.equal(field.view(bucket.flat), tensors[field.name])
    assert (len(buckets) == 1) == (limit == 10**9)
    for one, following in pairwise(buckets):  # none had room for the next weight
        weight = next(weight for weight in weights_of(arch) if following.names[0] in weight.hf)
        assert len(one.flat) + sum(tensors[name].nbytes for name in weight.hf) > limit


def test_wrong_options_are_one_sentence(tmp_path, capsys):
    assert weight_sync.main(["--bucket-mib", "0", "--output", str(tmp_path / "x.json")]) == 2
    assert "sglang.bucket_mib" in capsys.readouterr().err
    assert weight_sync.main(["--rounds", "0", "--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "--rounds is 0; it must be at least 1\n"
