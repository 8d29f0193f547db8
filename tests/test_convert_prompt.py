"""`tools/convert_hf.py verify --prompt` with a tokenizer in the checkpoint: logits are those of the prompt's tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from etr_megatron.convert import comparison
from etr_megatron.weights import read_architecture
from tests.test_convert_failures import refusal
from tests.test_data_sources import byte_tokenizer
from tools.convert_hf import main


@pytest.fixture
def hf(hf_models, tmp_path):
    """A checkpoint with one token per byte."""
    folder = Path(shutil.copytree(hf_models["qwen3"], tmp_path / "hf"))
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_logits_are_those_of_the_prompts_tokens(gangs, hf, megatron):
    """The largest logit identifies the prompt: it differs between these prompts."""
    model, largest = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval(), set()
    for prompt, options in ((comparison.PROMPT, {}), ("12+7=", {"prompt": "12+7="}), ("x", {"prompt": "x"})):
        ids = byte_tokenizer().encode(prompt)
        assert len(ids) == len(prompt)
        (found,) = gangs(1).run("tests.convert_jobs:verified", hf=str(hf), megatron=str(megatron), **options)
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits.abs().max().item()
        assert found.same and found.logits[1] == pytest.approx(wanted, rel=1e-6)
        largest.add(round(wanted, 3))
    assert len(largest) == 3


def test_a_prompt_for_a_checkpoint_without_a_tokenizer_is_refused(capsys, hf_models, megatron):
    said = refusal(capsys, "verify", "--hf", hf_models["qwen3"], "--megatron", megatron, "--prompt", "12+7=")
    assert said == f"error: {hf_models['qwen3']} has no tokenizer for --prompt; leave it out to compare on made-up tokens\n"


def test_a_prompt_that_is_no_text_or_longer_than_the_model_takes_is_refused(capsys, hf, megatron):
    argv = ("verify", "--hf", hf, "--megatron", megatron, "--prompt")
    assert (
        refusal(capsys, *argv, "caf\udce9") == "error: --prompt is not UTF-8; give another one\n"
    )  # bytes of another encoding
    longest = read_architecture(hf).max_positions
    said = refusal(capsys, *argv, "x" * (longest + 1))
    assert (
        said
        == f"error: --prompt has {longest + 1} tokens, more than the {longest} positions of the model; give a shorter one\n"
    )


def test_a_prompt_without_tokens_is_refused_before_anything_is_compared(capsys, hf, megatron, monkeypatch):
    monkeypatch.setattr(comparison, "_compare_tensors", lambda *_: pytest.fail("compared"))
    argv = ("verify", "--hf", hf, "--megatron", megatron, "--prompt", "")
    assert refusal(capsys, *argv) == "error: --prompt has no tokens; give another one\n"


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_compared(capsys, hf, megatron, monkeypatch):
    monkeypatch.setattr(comparison, "_compare_tensors", lambda *_: pytest.fail("compared"))
    file = hf / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["1"] = 70_000
    file.write_text(json.dumps(content))
    said = refusal(capsys, "verify", "--hf", hf, "--megatron", megatron, "--prompt", "12+7=")
    assert said.startswith(
        f"error: {hf}: the tokenizer produces token id 70000 for the prompt, but the model has only 301 tokens (vocab_size"
    )


@pytest.mark.parametrize("change", [{"pad_token_id": 99_999}, {"attention_dropout": "some"}])
def test_a_config_that_transformers_does_not_take_is_refused_before_anything_is_compared(
    capsys, hf, megatron, monkeypatch, change
):
    file = hf / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert main(["verify", "--hf", str(hf), "--megatron", str(megatron), "--no-logits"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(comparison, "_compare_tensors", lambda *_: pytest.fail("compared"))
    said = refusal(capsys, "verify", "--hf", hf, "--megatron", megatron)
    assert said.startswith(f"error: transformers cannot build the model of {file} (")


def test_a_tokenizer_that_does_not_load_is_named_by_the_option(capsys, hf, megatron):
    (hf / "tokenizer.json").write_text("{}")
    said = refusal(capsys, "verify", "--hf", hf, "--megatron", megatron)
    assert said.startswith(f"error: --hf: the tokenizer in '{hf}' cannot be loaded (KeyError: ")
