"""The LoRA benchmark: one whole run of a tiny model, and its options."""

from __future__ import annotations

import json

import pytest

from benchmarks import fresh_ranks, lora
from tests import warm


@pytest.mark.slow
def test_a_tiny_run_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fresh_ranks, "subprocess", warm.Subprocess)
    output = tmp_path / "result.json"
    assert lora.main(["--quick", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    full, adapters = (result["medians"][name] for name in ("all_weights", "adapters"))
    assert full["gradient_bytes"] >= 4 * result["parameters"] and full["optimizer_bytes"] >= 12 * result["parameters"]
    assert full["base_bytes"] == 0 < adapters["base_bytes"]
    assert [one["updates"] for one in result["effect"]] == [1, 2]
    assert all(one["nearest_changed"] < one["ours_changed"] < 1 for one in result["effect"])
    assert "adapters / all_weights: update_s" in capsys.readouterr().out


def test_wrong_options_are_one_sentence(tmp_path, capsys):
    assert lora.main(["--rounds", "0", "--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "--rounds is 0; it must be at least 1\n"
