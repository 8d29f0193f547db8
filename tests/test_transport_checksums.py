"""Checksums of the transports that use full tensors: a flipped bit anywhere is detected and named on every rank."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("kind", "place", "fp8_block"),
    [
        ("broadcast", "gathered", None),
        ("broadcast", "cut", None),
        ("broadcast", "cut", 16),
        ("disk", "gathered", None),
    ],
)
def test_a_flipped_bit_is_named_on_every_rank_and_nobody_has_a_version(gangs, hf_models, tmp_path, kind, place, fp8_block):
    found = gangs(3 if kind == "broadcast" else 2).run(
        "tests.transport_fault_jobs:corrupted",
        kind=kind,
        model=hf_models["qwen3"],
        place=place,
        directory=str(tmp_path),
        fp8_block=fp8_block,
    )
    for error, complete in found:
        assert "pieces that differ from their source after the transfer: 1, first model.layers.2.mlp.down_proj.weight" in error
        assert complete is None
    assert [path.name for path in tmp_path.iterdir()] == (["version_000002"] if kind == "disk" else [])
