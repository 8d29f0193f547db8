"""A run from a converted directory equals one from the HuggingFace original, and its checkpoints convert back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from etr_megatron.convert import Ranks, to_hf, to_megatron
from tools.convert_hf import main

SETTINGS = ["run.steps=2", "checkpoint.every=1", "eval.every=2"]


@pytest.mark.slow
def test_a_run_from_a_converted_directory_is_the_same_run(runs, tmp_path, capsys):
    code, printed = runs.finish("run.name=tiny", *SETTINGS)
    assert code == 0, printed
    started_from = next(path for path in Path(runs._common[1].partition("=")[2]).iterdir() if (path / "config.json").is_file())
    to_megatron(started_from, tmp_path / "megatron", Ranks())
    code, printed = runs.finish("run.name=converted", f"model.path={tmp_path / 'megatron'}", *SETTINGS)
    assert code == 0, printed
    assert len(runs.rows("tiny")) == 2
    for found, wanted in zip(runs.rows("converted"), runs.rows("tiny"), strict=True):
        # These depend on the engine's rounding, which differs because its replica's weights lie elsewhere in memory.
        for key in ("logprob_gap_mean", "logprob_gap_max", "mismatch_kl"):
            assert found.pop(key) == pytest.approx(wanted.pop(key), abs=1e-6)
        assert found == wanted

    # A run directory stands for its newest checkpoint; config and tokenizer come from the model that the run started from.
    for name in ("tiny", "converted"):
        to_hf(runs.directory(name), tmp_path / f"{name}_hf", Ranks())
    steps = sorted((runs.directory("tiny") / "checkpoints").iterdir())
    assert [step.name for step in steps] == ["step_000001", "step_000002"]
    hf = ["--hf", str(tmp_path / "converted_hf"), "--no-logits", "--megatron"]
    assert main(["verify", *hf, str(runs.directory("tiny"))]) == 0
    assert main(["verify", *hf, str(steps[1])]) == 0
    assert main(["verify", *hf, str(steps[0])]) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "tiny_hf")
    ids = AutoTokenizer.from_pretrained(tmp_path / "tiny_hf").encode("12+7=")
    assert ids == AutoTokenizer.from_pretrained(started_from).encode("12+7=")
    assert json.loads((tmp_path / "tiny_hf" / "config.json").read_text())["dtype"] == "float32"
