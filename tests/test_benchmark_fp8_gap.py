"""The FP8 gap benchmark: its rounding, and a whole run on a tiny checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import fp8_gap
from etr_megatron.config import load_config
from etr_megatron.data import build_tiny_policy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    overrides = ["tiny.warm_start_steps=3", f"tiny.cache_dir={tmp_path_factory.mktemp('cache')}", "tiny.layers=2"]
    config = load_config(None, [*overrides, "tiny.intermediate_size=136"])
    return build_tiny_policy(config.tiny, config.arithmetic, progress=False)


def nearest(value: float) -> float:
    """The nearest number of e4m3: 4 significant bits from 2^-6 on, steps of 2^-9 below, ties to even."""
    if value == 0:
        return 0.0
    exponent = max(torch.tensor(abs(value)).log2().floor().item(), -6)
    step = 2.0 ** (exponent - 3)
    return round(value / step) * step


def test_a_row_is_rounded_to_e4m3_in_groups_of_128_with_a_scale_each():
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[:, 130:] *= 1000
    found = fp8_gap.quantized_rows(values)
    for row in range(3):
        for group in (slice(0, 128), slice(128, 200)):
            scale = values[row, group].abs().max().item() / 448
            wanted = [nearest(value / scale) * scale for value in values[row, group].tolist()]
            # A value near a tie may be rounded to the other side, as the scale is fp32 there.
            assert torch.isclose(found[row, group].double(), torch.tensor(wanted, dtype=torch.float64)).float().mean() > 0.98
            assert (found[row, group].double() - values[row, group]).abs().max() <= 16.01 * scale


def test_layers_but_not_the_head_are_in_fp8(model):
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantized = fp8_gap.in_fp8(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    values = torch.randn(5, plain.config.hidden_size, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantized.lm_head(values), plain.lm_head(values))
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        one, other = (each.model.layers[1].get_submodule(name)(values) for each in (plain, quantized))
        assert 0 < (one - other).norm() / one.norm() < 0.1


@pytest.mark.slow
def test_a_run_writes_the_gaps_of_every_pair(model, tmp_path, capsys):
    output = tmp_path / "gap.json"
    assert fp8_gap.main([f"--model={model}", "--samples=2", "--tokens=5", f"--output={output}"]) == 0
    result = json.loads(output.read_text())
    assert 0 < result["tokens"] <= 2 * 8 * 5 and result["entropy"] > 0
    gaps = result["gaps"]
    assert list(gaps) == ["fp32 - bf16", "bf16 - bf16'", "bf16 - fp8", "fp8 - fp8'"]
    assert all(each["mean"] <= each["max"] and each["mean_exp"] >= 1 + each["mean"] for each in gaps.values())
    assert gaps["bf16 - fp8"]["mean"] > 2 * gaps["fp32 - bf16"]["mean"] > 0
    right, fp8, wrong = result["probes"].values()
    assert list(result["probes"]) == ["bf16' - bf16", "fp8 - bf16", "fp8 - swapped"]
    assert 0 <= right["smallest"] <= right["largest"] < fp8["largest"] and fp8["smallest"] < wrong["smallest"]
    assert "mean of exp" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "sentence"), [(["--samples=0"], "--samples is 0"), ([], "--model: there is no directory")])
def test_a_mistake_is_one_sentence(tmp_path, capsys, options, sentence):
    assert fp8_gap.main([f"--model={tmp_path / 'none'}", f"--output={tmp_path / 'gap.json'}", *options]) == 2
    assert sentence in capsys.readouterr().err
