"""The checkpoint benchmark: one whole run of a tiny model, and its options."""

from __future__ import annotations

import json

import pytest

from benchmarks import checkpoint, fresh_ranks
from tests import warm


@pytest.mark.slow
def test_a_tiny_run_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fresh_ranks, "subprocess", warm.Subprocess)
    output = tmp_path / "result.json"
    assert checkpoint.main(["--quick", "--ranks", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["ranks"] == 2 and result["medians"].keys() == set(checkpoint.CONTESTANTS)
    # Per parameter, 12 bytes of optimizer state and 4 of the weight, of which a rank reads half; plus metadata.
    assert all(one["load_read_bytes"] > result["parameters"] * (12 + 4) / 2 for one in result["medians"].values())
    medians = result["medians"]
    assert medians["asynchronous"]["stop_s"] < medians["asynchronous"]["save_s"]
    assert "by_rank / megatron: stop_s" in capsys.readouterr().out


def test_wrong_options_are_one_sentence(tmp_path, capsys):
    assert checkpoint.main(["--ranks", "0", "--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "--ranks is 0; it must be at least 1\n"
    assert checkpoint.main(["--contestants", "megatron", "--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("--contestants must be some of by_rank, ")
