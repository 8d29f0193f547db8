"""The weight-sync benchmark without a server; its syncs are in test_sglang_server.py."""

from __future__ import annotations

import pytest
import torch

from benchmarks import weight_sync


@pytest.mark.parametrize(("limit", "groups"), [(1, ["a", "b", "c", "d"]), (100, ["ab", "c", "d"]), (10**6, ["abcd"])])
def test_buckets_hold_every_tensor_once_and_at_most_the_limit_unless_it_is_larger(limit, groups):
    sizes = {"a": (3, 5), "b": (7,), "c": (2, 3, 11), "d": (1,)}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    buckets = list(weight_sync.buckets_of(tensors, limit))
    assert [bucket.names for bucket in buckets] == [list(group) for group in groups]
    for bucket in buckets:
        for field in bucket.fields:
            assert torch.equal(field.view(bucket.flat), tensors[field.name])


def test_wrong_options_are_one_sentence(tmp_path, capsys):
    assert weight_sync.main(["--rounds", "0", "--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "--rounds is 0; it must be at least 1\n"
