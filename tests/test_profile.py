"""A PyTorch trace of a step's first update."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from etr_megatron.observe import profiled


def names(file: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]


def test_a_trace_has_what_was_computed_within_and_nothing_else(tmp_path):
    torch.ones(2).cos()
    with profiled(tmp_path / "profiles" / "one.json.gz"):
        torch.ones(2).sin()
    torch.ones(2).tan()
    found = names(tmp_path / "profiles" / "one.json.gz")
    assert "aten::sin" in found and not {"aten::cos", "aten::tan"} & set(found)


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "profiles").write_text("a file, where the directory must be")
    with profiled(tmp_path / "profiles" / "one.json.gz"):
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"the profile {tmp_path / 'profiles' / 'one.json.gz'} could not be written: " in caplog.text


@pytest.mark.slow
def test_each_rank_of_the_first_replica_writes_a_trace_of_the_steps_first_update(runs):
    code, printed = runs.finish("run.name=profiled", "run.steps=2", "eval.every=0", "observe.profile_step=2", "parallel.tp=2")
    assert code == 0, printed
    files = sorted((runs.directory("profiled") / "profiles").iterdir())
    assert [file.name for file in files] == ["step_000002_rank_0.json.gz", "step_000002_rank_1.json.gz"]
    for file in files:
        found = names(file)
        assert sum(name.startswith("Optimizer.step#") for name in found) == 1
        assert any(name.startswith("gloo:") for name in found)
