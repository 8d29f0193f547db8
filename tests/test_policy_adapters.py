"""Low-rank adapters against autograd through transformers, in every way of cutting a model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from etr_megatron.errors import UserError
from etr_megatron.weights import LowRank, TrainingLayout, read_architecture
from etr_megatron.weights.run_checkpoint import LORA_FILE
from tests import test_policy_checkpoints, test_policy_gradients
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_get_the_gradients_of_the_merged_weights_in_any_layout(gangs, hf_models, references, layout):
    family, world, overrides = LAYOUTS[layout]
    factors, olds, gradients, merged = references(family)
    options = dict(model=hf_models[family], sequences=random_sequences(), old_logp=olds, factors=factors)
    ranks = gangs(world).run("tests.adapter_jobs:step", overrides=[*BASE, *overrides], **options)
    base = load_file(next(Path(hf_models[family]).glob("*.safetensors")))
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
            torch.testing.assert_close(found["base"][name], base[name], atol=0, rtol=0)
            torch.testing.assert_close(found["restored"][name], tensor, atol=0, rtol=0)
            is_trained = f"lora.{name.removesuffix('.weight')}.A" in factors
            assert torch.equal(found["updated"][name], tensor) is not is_trained, name
        assert found["with_buffers"] and all(name.startswith("adapters.") for name in found["with_buffers"])
        assert not found["with_gradients"]


@pytest.mark.parametrize(
    ("family", "world", "overrides"),
    [
        ("qwen3", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
        ("qwen3_moe", 2, ["parallel.tp=1", "parallel.ep=2", "train.distributed_optimizer=true"]),
        ("qwen3_moe", 2, ["parallel.tp=2", "parallel.sequence_parallel=true", "lora.expert_rank=2"]),
        ("qwen3_moe", 2, ["parallel.tp=1", "parallel.etp=2", "train.distributed_optimizer=true"]),
    ],
)
def test_clipped_updates_of_adapters_do_not_depend_on_the_split(gangs, hf_models, family, world, overrides):
    limit = "train.clip_grad=0.05"
    lora = [limit, *ADAPTED, *(one for one in overrides if one.startswith("lora."))]
    wanted = run(gangs, hf_models[family], 1, ["parallel.tp=1", *lora])[0]
    assert min(wanted["grad_norm"]) > 0.05  # above the limit, so a wrong norm would show in the weights
    for found in run(gangs, hf_models[family], world, [limit, *ADAPTED, *overrides]):
        assert_same_run(found, wanted)


def test_reference_of_the_kl_term_is_the_model_without_adapters(gangs, hf_models):
    found = run(gangs, hf_models["llama"], 1, ["parallel.tp=1", "objective.kl_coef=0.1", *ADAPTED])[0]
    assert found["sums"][0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["sums"][1]["kl"] > 1e-6


def test_factors_start_as_those_of_peft_and_alike_in_every_layout(gangs, hf_models):
    options = ["lora.rank=3", "lora.targets=[down_proj, q_proj]", "lora.expert_rank=0"]
    (single,) = gangs(1).run("tests.adapter_jobs:initial", model=hf_models["qwen3"], overrides=["parallel.tp=1", *options])
    for found in gangs(2).run("tests.adapter_jobs:initial", model=hf_models["qwen3"], overrides=["parallel.tp=2", *options]):
        assert found.keys() == single.keys()
        assert all(torch.equal(found[name], factor) for name, factor in single.items())
    assert {name.split(".")[-2] for name in single} == {"q_proj", "down_proj"}
    for name, factor in single.items():
        if name.endswith(".B"):
            assert not factor.any()
        else:
            bound = factor.shape[1] ** -0.5
            assert 0.9 * bound < factor.abs().max() <= bound
            assert factor.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert len({factor[0, 0].item() for name, factor in single.items() if name.endswith(".A")}) == len(single) // 2


@pytest.mark.parametrize(
    ("family", "targets", "stages", "message"),
    [
        ("qwen3", ("q_proj", "kv_b_proj"), 1, "the model has no trainable kv_b_proj; it has q_proj, k_proj,"),
        ("qwen3_moe", ("up_proj",), 1, "the model has no trainable up_proj outside of routed experts (lora.expert_rank is 0)"),
        (
            "qwen3_moe_dense",
            ("up_proj",),
            4,
            "no layer of pipeline stage 3 has one of them; add a target, or lower parallel.pp",
        ),
    ],
)
def test_targets_that_would_train_nothing_are_refused(hf_models, family, targets, stages, message):
    spec, arch = LowRank(3, 1.5, targets, expert_rank=0), read_architecture(hf_models[family])
    with pytest.raises(UserError, match=re.escape(f"lora.targets: {message}")):
        spec.refuse_untrained(arch, TrainingLayout(pp=stages))


def test_job_refuses_targets_that_the_model_lacks(gangs, hf_models):
    options = ["parallel.tp=1", "lora.rank=3", "lora.targets=[kv_b_proj]"]
    (error,) = gangs(1).run("tests.adapter_jobs:refusal", model=hf_models["qwen3"], overrides=options)
    assert error.startswith("lora.targets: the model has no trainable kv_b_proj")


SP, SHARDED = "parallel.sequence_parallel=true", "train.distributed_optimizer=true"


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("qwen3", (2, ["parallel.tp=2", SP]), (2, ["parallel.tp=1", "parallel.pp=2"])),
        ("qwen3", (1, ["parallel.tp=1", "model.dtype=bfloat16"]), (1, ["parallel.tp=1", "model.dtype=bfloat16"])),
        (
            "qwen3_moe",
            (2, ["parallel.tp=1", "parallel.ep=2", SHARDED]),
            (2, ["parallel.tp=2", SP, "parallel.ep=2", "parallel.etp=1", SHARDED]),
        ),
    ],
)
def test_adapters_continue_in_another_layout(gangs, hf_models, tmp_path, family, before, after):
    before, after = ((world, [*ADAPTED, *overrides]) for world, overrides in (before, after))
    test_policy_checkpoints.check(gangs, hf_models[family], tmp_path, before, after)
    (step,) = tmp_path.iterdir()
    assert json.loads((step / LORA_FILE).read_text()) == {"rank": 3, "alpha": 1.5, "targets": [], "expert_rank": None}
    stored = set(FileSystemReader(step).read_metadata().state_dict_metadata)
    assert stored >= factors_of(hf_models[family], LowRank(3, 1.5)).keys()
    assert not [name for name in stored if "decoder." in name or "embedding." in name]


@pytest.mark.parametrize("sharded", ["false", "true"], ids=["plain", "distributed_optimizer"])
def test_adapters_of_experts_alone_continue(gangs, hf_models, tmp_path, sharded):
    """Megatron's optimizer of dense weights then has none on any rank."""
    options = [*ADAPTED, "parallel.tp=1", "lora.targets=[down_proj]", f"train.distributed_optimizer={sharded}"]
    test_policy_checkpoints.check(gangs, hf_models["qwen3_moe"], tmp_path, (2, [*options, "parallel.ep=2"]), (1, options))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (ADAPTED, [], "was written with lora.rank=3, lora.alpha=1.5, lora.targets=[], lora.expert_rank=null; set that again"),
        ([], ADAPTED, "was written with lora.rank=0; set that again, or choose another run.name"),
        (ADAPTED, ["lora.rank=3"], "was written with lora.rank=3, lora.alpha=1.5"),
    ],
)
def test_other_adapters_than_those_of_a_checkpoint_are_refused(gangs, hf_models, tmp_path, before, after, message):
    options = dict(model=hf_models["llama"], folder=str(tmp_path))
    options |= {"before": ["parallel.tp=1", *before], "after": ["parallel.tp=1", *after]}
    (error,) = gangs(1).run("tests.adapter_jobs:refused_checkpoint", **options)
    assert message in error and "step_000000" in error


@pytest.mark.parametrize(
    ("recipes", "kept"), [(("delayed", "delayed"), True), (("delayed", "none"), False), (("none", "delayed"), False)]
)
def test_delayed_scaling_goes_on_with_its_scales(gangs, hf_models, tmp_path, recipes, kept):
    """Without them, the first log-probs after a resume would be as poor as those before the first update."""
    options = dict(model=hf_models["qwen3"], folder=str(tmp_path), recipes=recipes)
    ((saved, found),) = gangs(1).run("tests.adapter_jobs:resumed_scales", **options)
    assert len(saved) > 4 and found == (saved if kept else {})


def test_adapters_of_another_model_are_refused_in_any_layout(gangs, hf_models, tmp_path):
    """The other model differs in one element of one matrix."""
    other = shutil.copytree(hf_models["qwen3_moe"], tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.3.self_attn.o_proj.weight"][1, 2] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    options = dict(
        model=hf_models["qwen3_moe"], folder=str(tmp_path / "run"), before=["parallel.tp=1", "parallel.ep=2", *ADAPTED]
    )
    options["after"] = ["parallel.tp=2", SP, "parallel.ep=2", "parallel.etp=1", *ADAPTED]
    assert gangs(2).run("tests.adapter_jobs:refused_checkpoint", **options) == ["none", "none"]
    for error in gangs(2).run("tests.adapter_jobs:refused_checkpoint", other_model=str(other), **options):
        assert f"has adapters of another model than {other} is now with model.dtype=float32; restore both" in error
