"""tools/convert_hf.py with checkpoints of low-rank adapters: merged models, adapters in PEFT's format, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from etr_megatron.convert import Ranks, to_adapter, to_hf, to_megatron, verify
from etr_megatron.errors import UserError
from etr_megatron.weights import LowRank, check_checkpoint, join_shards, megatron_shard, read_architecture
from etr_megatron.weights.low_rank import add_products
from etr_megatron.weights.quantize import quantize_blocks
from tests.adapter_checkpoints import merged, rounded, write_adapters
from tests.hf_models import by_published_names
from tests.test_convert import assert_same_bits, tensors_of
from tools.convert_hf import main

LOW_RANK = {
    "qwen3": LowRank(5, 7.5),
    "qwen3_moe_dense": LowRank(5, 7.5, ("k_proj", "o_proj", "gate_proj", "down_proj"), expert_rank=2),
    "deepseek_v3": LowRank(3, 8.0, ("kv_a_proj_with_mqa", "kv_b_proj", "up_proj"), expert_rank=6),
}
ULPS = dict(rtol=3e-7, atol=1e-7)


@pytest.fixture(params=["qwen3", "qwen3_moe_dense"])
def family(request):
    return request.param


@pytest.fixture
def low_rank(family):
    return LOW_RANK[family]


@pytest.fixture
def step(tmp_path):
    return tmp_path / "run" / "checkpoints" / "step_000003"


def refusal(capsys, *arguments: str | Path) -> str:
    """The sentence with which the command line refuses."""
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_adapted_tensor_has_its_product_added_and_the_others_are_copied(hf_models, tmp_path, step, family, low_rank):
    stored, base = write_adapters(step, hf_models[family], low_rank), tensors_of(hf_models[family])
    to_hf(tmp_path / "run", tmp_path / "out", Ranks(), max_file_bytes=60_000)
    found, wanted = tensors_of(tmp_path / "out"), merged(base, stored, low_rank)
    adapted = {name.removeprefix("lora.").removesuffix(".A") + ".weight" for name in stored if name.endswith(".A")}
    assert found.keys() == base.keys() > adapted
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        if name in adapted:
            assert (tensor - base[name]).abs().max() > 0.1, name
            torch.testing.assert_close(tensor.double(), wanted[name], **ULPS)
        else:
            assert torch.equal(tensor, base[name]), name
    config = json.loads((Path(hf_models[family]) / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_are_those_of_a_run_in_its_type_however_it_cuts_weights(hf_models, tmp_path, step, family, low_rank, dtype):
    """The base is fp32: a run in bf16 rounds it first, and then the sums."""
    stored = write_adapters(step, hf_models[family], low_rank, dtype)
    to_hf(step, tmp_path / "out", Ranks())
    found, arch = tensors_of(tmp_path / "out"), read_architecture(hf_models[family])
    base = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors_of(hf_models[family]).items()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    for weight, adapters in low_rank.adapted(arch):
        pairs = {adapter.hf: (adapter, tuple(stored[name] for name in adapter.stored)) for adapter in adapters}
        for tp in (1, 2):
            shards = [megatron_shard(weight, arch, tp, rank) for rank in range(tp)]
            parts = []
            for shard in shards:
                values = torch.empty(shard.shape, dtype=getattr(torch, dtype))
                for piece in shard.pieces:
                    at, begin = (
                        tuple(slice(b, b + n) for b, n in zip(corner, piece.size, strict=True))
                        for corner in (piece.at, piece.begin)
                    )
                    values[at] = base[weight.hf[piece.hf]][begin]
                parts.append((shard, add_products(values, shard, pairs)))
            whole = join_shards(weight, parts)
            assert_same_bits({name: found.pop(name) if tp == 2 else found[name] for name in weight.hf}, whole)
    assert_same_bits(found, {name: base[name] for name in found})


def test_without_the_config_of_the_run_the_type_is_that_of_the_base_given(hf_models, tmp_path, step):
    half = tmp_path / "half"
    half.mkdir()
    base = {name: tensor.bfloat16() for name, tensor in tensors_of(hf_models["qwen3"]).items()}
    save_file(base, half / "model.safetensors")
    shutil.copyfile(Path(hf_models["qwen3"]) / "config.json", half / "config.json")
    stored = write_adapters(step, half, LOW_RANK["qwen3"], dtype=None)
    with pytest.raises(UserError, match=r"config\.yaml, which names the model of these adapters, does not exist; .*--base$"):
        to_hf(step, tmp_path / "out", Ranks())
    to_hf(step, tmp_path / "out", Ranks(), base=half)
    wanted = rounded(merged(base, stored, LOW_RANK["qwen3"]))
    assert_same_bits(tensors_of(tmp_path / "out"), wanted)

    save_file({name: tensor.half() for name, tensor in base.items()}, half / "model.safetensors")
    with pytest.raises(UserError, match=r"--base .*_proj\.weight is torch\.float16, which no run .*config\.yaml"):
        to_hf(step, tmp_path / "refused", Ranks(), base=half)


def test_the_base_may_be_fp8_or_torch_dist_and_the_output_fp8(hf_models, tmp_path, step):
    """What fp8 stands for is the base; the output is quantised from the merged values as a sync of them would be."""
    hf, low_rank = Path(hf_models["qwen3"]), LOW_RANK["qwen3"]
    to_megatron(hf, tmp_path / "megatron", Ranks(), torch.bfloat16)
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), fp8_block=128)
    to_megatron(tmp_path / "fp8", tmp_path / "again", Ranks())
    to_hf(tmp_path / "again", tmp_path / "read", Ranks())
    stored, base = write_adapters(step, tmp_path / "fp8", low_rank, "bfloat16"), tensors_of(tmp_path / "read")
    to_hf(step, tmp_path / "from_fp8", Ranks())
    wanted = rounded(merged(base, stored, low_rank))
    assert_same_bits(tensors_of(tmp_path / "from_fp8"), wanted)
    assert "quantization_config" not in json.loads((tmp_path / "from_fp8" / "config.json").read_text())

    to_hf(step, tmp_path / "from_torch_dist", Ranks(), base=tmp_path / "again")
    assert_same_bits(tensors_of(tmp_path / "from_torch_dist"), wanted)

    to_hf(step, tmp_path / "to_fp8", Ranks(), fp8_block=128)
    found = tensors_of(tmp_path / "to_fp8")
    name = "model.layers.2.mlp.up_proj.weight"
    values, scales = quantize_blocks(wanted[name], 128)
    assert torch.equal(found[name].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(found[f"{name}_scale_inv"], scales)
    result = verify(tmp_path / "to_fp8", step, Ranks(), logits=False)
    assert result.same and len(result.rounded) == 28


REAL = {
    "tp2": ("qwen3", 2, ["parallel.tp=2", "lora.targets=[q_proj, v_proj, up_proj]"]),
    "tp2_ep2_bf16": (
        "qwen3_moe_dense",
        2,
        [
            *("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2", "parallel.etp=1"),
            *("model.dtype=bfloat16", "lora.expert_rank=2"),
        ],
    ),
}


@pytest.mark.parametrize("layout", REAL)
def test_a_run_with_adapters_becomes_what_it_serves_and_no_other_base_will_do(gangs, hf_models, tmp_path, capsys, layout):
    family, ranks, overrides = REAL[layout]
    run, hf = tmp_path / "run", hf_models[family]
    job = {"model": hf, "out": str(run / "checkpoints"), "overrides": ["lora.rank=3", *overrides]}
    exported = gangs(ranks).run("tests.convert_jobs:train_and_save", **job)[0]
    dtype = exported["model.norm.weight"].dtype
    (run / "config.yaml").write_text(f"model: {{path: {hf}, dtype: {str(dtype).removeprefix('torch.')}}}")
    to_hf(run, tmp_path / "out", Ranks())
    found = tensors_of(tmp_path / "out")
    assert_same_bits(found, exported)
    moved = {name for name, tensor in tensors_of(hf).items() if not torch.equal(found[name], tensor.to(dtype))}
    assert moved and all(name.endswith("_proj.weight") for name in moved)
    (step,) = (run / "checkpoints").iterdir()
    shutil.copytree(step, tmp_path / "alone")  # without the run's config.yaml
    to_hf(tmp_path / "alone", tmp_path / "again", Ranks(), base=Path(hf))
    assert_same_bits(tensors_of(tmp_path / "again"), exported)

    other = shutil.copytree(hf, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][5, 7] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    command = ["to-hf", "--megatron", run, "--out", tmp_path / "refused", "--base", other]
    assert f"--base {other} holds other weights than those that" in refusal(capsys, *command)
    assert not (tmp_path / "refused").exists()
    assert "holds other weights" in refusal(capsys, "verify", "--hf", hf, "--megatron", run, "--base", other, "--no-logits")


def test_verify_compares_the_merged_model_and_its_logits(gangs, hf_models, tmp_path, step, family, low_rank):
    write_adapters(step, hf_models[family], low_rank)
    to_hf(step, tmp_path / "out", Ranks())
    found = gangs(1).run("tests.convert_jobs:verified", hf=str(tmp_path / "out"), megatron=str(tmp_path / "run"))[0]
    assert found.same and found.differing == [] and found.logits[0] <= 1e-5
    (base,) = gangs(1).run("tests.convert_jobs:verified", hf=hf_models[family], megatron=str(step), logits=False)
    assert set(base.differing) == {
        f"{adapter.module}.weight" for _, some in low_rank.adapted(read_architecture(hf_models[family])) for adapter in some
    }


def test_two_processes_write_what_one_writes(gangs, hf_models, tmp_path, step):
    write_adapters(step, hf_models["qwen3_moe_dense"], LOW_RANK["qwen3_moe_dense"])
    for ranks, name in ((1, "one"), (2, "two")):
        gangs(ranks).run("tests.convert_jobs:merge", step=str(step), out=str(tmp_path / name))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert {str(file) for file in files} > {"merged/config.json", "adapter/adapter_model.safetensors"}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.parametrize("family", LOW_RANK)
def test_an_adapter_directory_has_the_products_in_one_rank_and_all_that_servers_fuse(hf_models, tmp_path, step, family):
    low_rank = LOW_RANK[family]
    stored = write_adapters(step, hf_models[family], low_rank)
    assert main(["to-hf", "--megatron", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--adapter"]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rank = max(low_rank.rank, low_rank.expert_rank or 0)
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": low_rank.alpha, "bias": "none"}
    assert told.items() <= config.items()
    assert config["base_model_name_or_path"] == hf_models[family]

    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in found}
    adapted = {name.removeprefix("lora.").removesuffix(".A") for name in stored if name.endswith(".A")}
    assert adapted <= modules and {name.rpartition(".")[2] for name in modules} == set(config["target_modules"])
    for module in modules:
        a, b = (found.pop(f"base_model.model.{module}.lora_{kind}.weight") for kind in "AB")
        assert a.dtype == b.dtype == torch.float32 and len(a) == b.shape[1] == rank
        product = low_rank.alpha / rank * (b.double() @ a.double())
        if module not in adapted:
            assert not product.any(), module
            continue
        own = stored[f"lora.{module}.A"]
        wanted = low_rank.alpha / len(own) * (stored[f"lora.{module}.B"].double() @ own.double())
        torch.testing.assert_close(product, wanted, **ULPS)
    assert not found
    fused = {"q_proj": "k_proj", "q_a_proj": "kv_a_proj_with_mqa", "up_proj": "gate_proj", "gate_proj": "up_proj"}
    for module in modules:
        before, _, kind = module.rpartition(".")
        if (before, kind) != (before, fused.get(kind, kind)):
            assert f"{before}.{fused[kind]}" in modules
        if ".experts." in module:
            assert f"{before}.down_proj" in modules
    # The experts' own weights are found by the names of modules; what else has such a name, only by that of the weight.
    aside = {f"{name}.weight" for name in modules if ".mlp." in name and ".experts." not in name}
    assert set(config["target_parameters"] or ()) == (aside if family != "qwen3" else set())
    weights = by_published_names(tensors_of(hf_models[family]))
    assert all(f"{module}.weight" in weights for module in modules)


def test_an_adapter_directory_may_be_rounded_and_its_base_another(hf_models, tmp_path, step):
    stored = write_adapters(step, hf_models["qwen3"], LOW_RANK["qwen3"])
    to_megatron(Path(hf_models["qwen3"]), tmp_path / "megatron", Ranks())
    to_adapter(step, tmp_path / "out", Ranks(), dtype=torch.bfloat16, base=tmp_path / "megatron")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    module = "model.layers.1.self_attn.v_proj"
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"base_model.model.{module}.lora_A.weight"]
    assert torch.equal(found, stored[f"lora.{module}.A"].bfloat16())


def test_options_that_do_not_go_together_are_refused(hf_models, tmp_path, step, capsys):
    hf = hf_models["qwen3"]
    write_adapters(step, hf, LOW_RANK["qwen3"])
    to_megatron(Path(hf), tmp_path / "megatron", Ranks())
    command = ["to-hf", "--megatron", step, "--out", tmp_path / "out"]
    assert "adapters are not quantised" in refusal(capsys, *command, "--adapter", "--fp8-block", "128")
    assert "one file" in refusal(capsys, *command, "--adapter", "--max-shard-gb", "1")
    assert "is not a directory" in refusal(capsys, *command, "--base", tmp_path / "absent")
    command[2] = tmp_path / "megatron"
    assert "holds a whole model; leave it out" in refusal(capsys, *command, "--base", hf)
    assert "holds a whole model and no adapters" in refusal(capsys, *command, "--adapter")
    assert "--base is for checkpoints" in refusal(capsys, "verify", "--hf", hf, "--megatron", command[2], "--base", hf)
    assert not (tmp_path / "out").exists()


def test_adapters_that_are_not_those_of_the_model_are_refused(hf_models, tmp_path, step, capsys):
    stored = write_adapters(step, hf_models["qwen3"], LOW_RANK["qwen3"])
    command = ["to-hf", "--megatron", step, "--out", tmp_path / "out"]
    (step / "lora.json").write_text(json.dumps(LowRank(4, 8.0).as_json()))
    assert f"{len(stored)} tensors are missing, unknown or of another shape" in refusal(capsys, *command)
    (step / "lora.json").write_text(json.dumps({"rank": 5, "alpha": 7.5, "size": 3}))
    assert "lora.json does not describe adapters" in refusal(capsys, *command)
    (step / "lora.json").write_text("{")
    assert "lora.json cannot be read as JSON" in refusal(capsys, *command)


def test_a_checkpoint_of_adapters_is_refused_wherever_a_model_belongs(hf_models, tmp_path, step, capsys):
    hf = hf_models["qwen3"]
    write_adapters(step, hf, LOW_RANK["qwen3"])
    shutil.copyfile(Path(hf) / "config.json", step / "config.json")
    with pytest.raises(UserError, match=r"model\.path .*step_000003 holds adapters .*convert_hf\.py to-hf --megatron"):
        check_checkpoint(step)
    out = tmp_path / "out"
    assert f"--hf {step} holds adapters" in refusal(capsys, "to-megatron", "--hf", step, "--out", out)
    assert f"--hf {step} holds adapters" in refusal(capsys, "verify", "--hf", step, "--megatron", hf)
    assert f"--base {step} holds adapters" in refusal(capsys, "to-hf", "--megatron", step, "--out", out, "--base", step)
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {step}}}")
    assert f"config.yaml: model.path {step} holds adapters" in refusal(capsys, "to-hf", "--megatron", step, "--out", out)
