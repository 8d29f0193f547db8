"""Low-rank adapters against autograd through transformers, in every way of cutting a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from etr_megatron.weights import LowRank, read_architecture
from tests import test_policy_gradients
from tests.hf_models import random_sequences
from tests.test_policy_training import assert_same_run, run

ADAPTED = ["lora.rank=3", "lora.alpha=1.5"]
SCALE = 0.5
BASE = [*test_policy_gradients.BASE, *ADAPTED]
LAYOUTS = {
    "tp1": ("qwen3", 1, ["parallel.tp=1"]),
    "tp2": ("qwen3", 2, ["parallel.tp=2"]),
    "tp2_sp_full_recompute": ("qwen2", 2, ["parallel.tp=2", "parallel.sequence_parallel=true", "train.recompute=full"]),
    "pp2_vpp2": ("qwen3", 2, ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2", "train.tokens_per_microbatch=40"]),
    "cp2_distributed_optimizer": ("qwen3", 2, ["parallel.tp=1", "parallel.cp=2", "train.distributed_optimizer=true"]),
    "tp2_pp2_tied": ("qwen2", 4, ["parallel.tp=2", "parallel.pp=2"]),
    "experts_tp2_sp": ("qwen3_moe", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "experts_tp2_sp_ep2_etp1": (
        "qwen3_moe",
        2,
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2", "parallel.etp=1"],
    ),
    "latent_tp2": ("deepseek_v3", 2, ["parallel.tp=2"]),
    "latent_tp2_sp_ep2_etp1": (
        "deepseek_v3",
        2,
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2", "parallel.etp=1"],
    ),
}


def factors_of(model: str, spec: LowRank) -> dict[str, torch.Tensor]:
    """Random A and B of every adapter, by name: none is zero."""
    generator, found = torch.Generator().manual_seed(3), {}
    for _, adapters in spec.adapted(read_architecture(model)):
        for one in adapters:
            for name, shape in zip(one.stored, ((one.rank, one.columns), (one.rows, one.rank)), strict=True):
                found[name] = 0.1 * torch.randn(shape, generator=generator)
    return found


def merged_checkpoint(model: str, factors: dict[str, torch.Tensor], out: Path) -> Path:
    """The checkpoint with W + scale B A for every W that has factors."""
    shutil.copytree(model, out)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        module = name.removesuffix(".weight")
        if f"lora.{module}.A" in factors:
            a, b = factors[f"lora.{module}.A"].double(), factors[f"lora.{module}.B"].double()
            tensors[name] = (tensors[name].double() + SCALE * b @ a).float()
    save_file(tensors, file, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def references(hf_models, tmp_path_factory):
    done = {}

    def get(family: str) -> tuple:
        """(factors, old log-probs, gradients of the merged weights by HF name)."""
        if family not in done:
            factors = factors_of(hf_models[family], LowRank(3, 1.5))
            merged = merged_checkpoint(hf_models[family], factors, tmp_path_factory.mktemp("merged") / family)
            olds, gradients, clipped = test_policy_gradients.reference(str(merged), random_sequences())
            assert 0.1 < clipped < 0.9
            done[family] = factors, olds, gradients, load_file(next(merged.glob("*.safetensors")))
        return done[family]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_get_the_gradients_of_the_merged_weights_in_any_layout(gangs, hf_models, references, layout):
    family, world, overrides = LAYOUTS[layout]
    factors, olds, gradients, merged = references(family)
    options = dict(model=hf_models[family], sequences=random_sequences(), old_logp=olds, factors=factors)
    ranks = gangs(world).run("tests.adapter_jobs:step", overrides=[*BASE, *overrides], **options)
    assert set().union(*(found["steps"] for found in ranks)) == factors.keys()
    for found in ranks:
        for name, step in found["steps"].items():
            module, side = name.removeprefix("lora.").rpartition(".")[::2]
            weight = gradients[f"{module}.weight"]
            a, b = factors[f"lora.{module}.A"].double(), factors[f"lora.{module}.B"].double()
            gradient = SCALE * (b.T @ weight if side == "A" else weight @ a.T)
            wanted = gradient / (gradient.abs() + 1)
            torch.testing.assert_close(step.double(), wanted, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        for name, tensor in found["merged"].items():
            torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-6)
