"""What only GLM-4.5's family has: the biases of its routers, its config, and its layers for multi-token prediction."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from etr_megatron.checks import check_architecture
from etr_megatron.config import load_config
from etr_megatron.convert import Ranks, to_hf, to_megatron
from etr_megatron.errors import UserError
from etr_megatron.weights import (
    ServerLayout,
    TorchDistDir,
    TrainingLayout,
    check_checkpoint,
    check_torch_dist,
    read_architecture,
    stored_shapes,
)
from etr_megatron.weights.reshard import make_reshard_plan
from etr_megatron.weights.transport.verify import destination_checksum, source_checksum
from tests import test_routing_replay
from tests.hf_models import random_sequences, write_model
from tests.policy_jobs import build, make_batch
from tests.test_policy_logprobs import MIXTURES, check, reference

BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"
BIASES = [BIAS.format(layer) for layer in (1, 2, 3)]

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}


def with_config(model: str, folder: Path, change: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    """A copy of the model with another config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in without} | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def drafting(hf_models, tmp_path) -> Path:
    """The model as published: with a layer for multi-token prediction after the last one, and biases that bf16 rounds."""
    folder = with_config(hf_models["glm4_moe"], tmp_path / "drafting", {"num_nextn_predict_layers": 1})
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor if name in BIASES else tensor.bfloat16() for name, tensor in tensors.items()}
    draft = {name.replace("layers.3.", "layers.4."): tensor.clone() for name, tensor in tensors.items() if "layers.3." in name}
    save_file({**tensors, **draft, "model.layers.4.eh_proj.weight": torch.ones(48, 96)}, folder / "model.safetensors")
    return folder


def test_the_biases_decide_which_experts_are_chosen(hf_models, tmp_path):
    """Without it, equality with transformers would not show that the policy uses them."""
    without = with_config(hf_models["glm4_moe"], tmp_path / "without", {})
    tensors = load_file(without / "model.safetensors")
    save_file({name: tensor * (name not in BIASES) for name, tensor in tensors.items()}, without / "model.safetensors")
    sequences = random_sequences()
    biased, plain = (reference(str(model), sequences)[0] for model in (hf_models["glm4_moe"], without))
    assert max((a - b).abs().max() for a, b in zip(biased, plain, strict=True)) > 0.05


@pytest.mark.parametrize("layout", ["tp1", "tp2_sp"])
def test_logprobs_without_norms_of_queries_and_keys_equal_transformers(gangs, hf_models, layout):
    world, overrides = MIXTURES[layout]
    sequences, model = random_sequences(), hf_models["glm4_moe_air"]
    wanted = reference(model, sequences)[0]
    for found, _ in gangs(world).run("tests.policy_jobs:logprobs", model=model, sequences=sequences, overrides=overrides):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(a).double(), b, atol=1e-5, rtol=1e-5)


def test_a_context_extended_as_llama_3s_turns_the_same_part_of_a_head(gangs, tmp_path):
    rope = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=32, partial_rotary_factor=0.25)
    model = write_model("glm4_moe", tmp_path / "long", rope_parameters=rope, partial_rotary_factor=0.25)
    check(gangs, model, *MIXTURES["tp2_sp"])


def biases_of_reference(model: str, overrides: list[str]) -> dict[str, Tensor]:
    from etr_megatron.policy.model import weights_in

    policy = build(model, ["objective.kl_coef=0.1", "model.dtype=bfloat16", *overrides])
    assert policy.reference is not None
    named = (item for chunk in policy.reference for item in weights_in(chunk).items())
    return {name: tensor.clone() for name, tensor in named if name.endswith("expert_bias")}


@pytest.mark.parametrize("kind", ["hf", "torch_dist"])
def test_the_reference_has_the_biases_too(gangs, drafting, tmp_path, kind):
    model, wanted = drafting, load_file(drafting / "model.safetensors")
    if kind == "torch_dist":
        to_megatron(drafting, model := tmp_path / "megatron", Ranks())
    (found,) = gangs(1).run("tests.test_glm4_moe:biases_of_reference", model=str(model), overrides=["parallel.tp=1"])
    assert found.keys() == {f"decoder.layers.{n}.mlp.router.expert_bias" for n in (1, 2, 3)}
    for number, name in enumerate(BIASES, 1):
        assert torch.equal(found[f"decoder.layers.{number}.mlp.router.expert_bias"], wanted[name])


def refusal(model: str, overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        build(model, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", [BIASES[1], "model.layers.3.mlp.experts.5.down_proj.weight"])
@pytest.mark.parametrize("kind", ["hf", "torch_dist"])
def test_a_checkpoint_with_nan_is_refused_on_every_rank(gangs, hf_models, tmp_path, name, kind):
    model = with_config(hf_models["glm4_moe"], tmp_path / "broken", {})
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, model / "model.safetensors")
    if kind == "torch_dist":
        to_megatron(model, model := tmp_path / "megatron", Ranks())
    for found in gangs(2).run("tests.test_glm4_moe:refusal", model=str(model), overrides=["parallel.tp=1", "parallel.ep=2"]):
        assert found == f"{model} has NaN or infinity in {name}"


def exported_after_updates(model: str, overrides: list[str], folder: str) -> dict[str, Tensor]:
    """The export after two updates, a checkpoint, and a resume from it in which the biases were lost."""
    from etr_megatron import checkpoint

    policy = build(model, ["train.lr=1e-2", *overrides])
    batch = make_batch(random_sequences())
    for _ in range(2):
        policy.update(batch)
    checkpoint.save(Path(folder), 1, policy, {}, keep=1)
    for chunk in policy.chunks:
        for name, buffer in chunk.named_buffers():
            if name.endswith("expert_bias"):
                buffer.fill_(7.0)
    checkpoint.load(Path(folder), 1, policy)
    return {name: tensor.clone() for name, tensor in policy.export()}


@pytest.mark.parametrize("layout", ["ep2", "pp2"])
def test_training_in_bf16_and_a_resume_leave_every_bit_of_the_biases(gangs, drafting, tmp_path, layout):
    world, overrides = MIXTURES[layout]
    job = dict(model=str(drafting), overrides=[*overrides, "model.dtype=bfloat16"], folder=str(tmp_path / "run"))
    before = load_file(drafting / "model.safetensors")
    assert not torch.equal(before[BIASES[0]], before[BIASES[0]].bfloat16().float())
    for found in gangs(world).run("tests.test_glm4_moe:exported_after_updates", **job):
        for name in BIASES:
            assert found[name].dtype == torch.float32 and torch.equal(found[name], before[name])
        assert not any(name.startswith("model.layers.4.") for name in found)
        router = found["model.layers.1.mlp.gate.weight"]
        assert router.dtype == torch.bfloat16 and not torch.equal(router, before["model.layers.1.mlp.gate.weight"])


def test_the_router_of_a_bf16_model_computes_in_fp32_as_servers_do(gangs, hf_models):
    job = dict(model=hf_models["glm4_moe"], sequences=random_sequences(), overrides=["train.moe_router_fp32=false"])
    (found,) = gangs(1).run("tests.test_glm4_moe:router_types", **job)
    assert found == {torch.float32}


def router_types(model: str, sequences: list, overrides: list[str]) -> set[torch.dtype]:
    """Dtypes of the logits that the routers compute in a bf16 model."""
    from etr_megatron.policy.routing import routers

    policy, found = build(model, ["parallel.tp=1", "model.dtype=bfloat16", *overrides]), set()
    for router in routers(policy.chunks):
        routing = router.routing
        router.routing = lambda logits, *rest, of=routing, **more: (found.add(logits.dtype), of(logits, *rest, **more))[1]
    policy.logprobs(sequences)
    return found


@pytest.mark.parametrize("fp8_block", [None, 4], ids=["bf16", "fp8"])
@pytest.mark.parametrize("transport", ["sharded", "sharded_tiny", "whole"])
def test_a_sync_leaves_every_bit_of_the_biases(gangs, drafting, transport, fp8_block):
    wanted, source = load_file(drafting / "model.safetensors"), TrainingLayout(dp=2, ep=2)
    job = dict(model=str(drafting), source=source, dtype=torch.bfloat16, fp8_block=fp8_block)
    if transport == "whole":
        handed = gangs(2).run("tests.transport_whole_jobs:whole", **job, bucket_bytes=20_000)[0]["tensors"]
    else:
        job |= dict(destination=ServerLayout(), tiny_messages=transport == "sharded_tiny")
        shards = gangs(3).run("tests.transport_jobs:sharded", **job)[2]["shards"]
        handed = {BIAS.format(n): shards[f"decoder.layers.{n}.mlp.router.expert_bias"] for n in (1, 2, 3)}
    for name in BIASES:
        assert handed[name].dtype == torch.float32 and torch.equal(handed[name], wanted[name])


def test_checksums_of_a_bf16_sync_see_every_bit_of_the_biases(hf_models):
    plan = make_reshard_plan(TrainingLayout(), ServerLayout(), read_architecture(hf_models["glm4_moe"]), itemsize=2)
    transfer = next(one for transfers in plan.pairs.values() for one in transfers if one.weight.fp32)
    bias = torch.rand(6)
    other = torch.nextafter(bias, torch.ones(6))
    for of in (source_checksum, destination_checksum):
        one, two = (of(plan, transfer, {transfer.weight.megatron: values}, torch.bfloat16) for values in (bias, other))
        assert one != two


def test_conversion_keeps_the_biases_in_fp32_and_leaves_out_layers_that_draft(gangs, drafting, tmp_path):
    to_megatron(drafting, tmp_path / "megatron", Ranks(), torch.bfloat16)
    stored = TorchDistDir(tmp_path / "megatron")
    assert stored.dtype("decoder.layers.1.mlp.router.expert_bias") == torch.float32
    to_hf(tmp_path / "megatron", tmp_path / "hf", Ranks(), dtype=torch.bfloat16)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and config["dtype"] == "bfloat16"
    before, after = load_file(drafting / "model.safetensors"), {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == {name for name in before if ".layers.4." not in name}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    (found,) = gangs(1).run("tests.convert_jobs:verified", hf=str(drafting), megatron=str(tmp_path / "megatron"))
    assert found.same and found.logits is not None and found.logits[0] < 1e-4


def test_an_fp8_conversion_keeps_the_biases_in_fp32(drafting, tmp_path):
    to_megatron(drafting, tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), fp8_block=16)
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    before, after = load_file(drafting / "model.safetensors"), load_file(file)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in BIASES)
    assert after["model.layers.1.mlp.shared_experts.up_proj.weight"].dtype == torch.float8_e4m3fn
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert "model.layers.1.mlp.gate" in config["quantization_config"]["modules_to_not_convert"]


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_model_without_dense_layers_has_megatrons_names_and_comes_back(gangs, tmp_path, family):
    model = Path(write_model(family, tmp_path / "model", first_k_dense_replace=0))
    job = dict(model=str(model), out=str(tmp_path / "run"), overrides=["parallel.tp=1", "parallel.ep=2"])
    gangs(2).run("tests.convert_jobs:train_and_save", **job)
    written = TorchDistDir(tmp_path / "run" / "step_000003")
    assert written.shapes() == stored_shapes(read_architecture(model))
    to_megatron(model, tmp_path / "megatron", Ranks())
    assert TorchDistDir(tmp_path / "megatron").shapes() == written.shapes()
    to_hf(tmp_path / "megatron", tmp_path / "back", Ranks())
    (file,) = (tmp_path / "back").glob("*.safetensors")
    before, after = load_file(model / "model.safetensors"), load_file(file)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_megatrons_layers_for_multi_token_prediction_are_left_out_as_well(drafting, tmp_path, monkeypatch):
    to_megatron(drafting, tmp_path / "megatron", Ranks())
    stored, arch = TorchDistDir(tmp_path / "megatron"), read_architecture(drafting)
    shapes = stored.shapes() | {"mtp.layers.0.eh_proj.weight": (48, 96)}
    monkeypatch.setattr(stored, "shapes", lambda: shapes)
    check_torch_dist(stored, arch)
    with pytest.raises(UserError, match="1 tensor is unknown to the glm4_moe family"):
        check_torch_dist(stored, replace(arch, mtp_layers=0))


def test_only_as_many_layers_may_follow_as_the_config_says(drafting):
    check_checkpoint(drafting)
    config = json.loads((drafting / "config.json").read_text())
    (drafting / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    hint = "if there are layers for multi-token prediction, set num_nextn_predict_layers to their number"
    with pytest.raises(UserError, match=rf"unknown to the glm4_moe family with 4 layers .*; {hint}$"):
        check_checkpoint(drafting)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is false; only true is supported for the glm4_moe family"),
        ({"n_group": 2}, "n_group is 2; only 1 is supported"),
        ({"topk_group": 2}, "topk_group is 2; only 1 is supported"),
        ({"attention_bias": False}, "attention_bias is false; only true is supported"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1, which leaves the router without a gradient"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7, more than the 6 experts"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be 0 or a positive integer, not -1"),
        ({"first_k_dense_replace": 0.0}, "first_k_dense_replace must be 0 or a positive integer, not 0.0"),
        ({"num_nextn_predict_layers": False}, "num_nextn_predict_layers must be 0 or a positive integer, not false"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace is 4, which leaves none of the 4 layers with experts"),
        ({"n_shared_experts": 0}, "n_shared_experts must be a positive integer, not 0"),
        ({"routed_scaling_factor": "2.5"}, 'routed_scaling_factor must be a positive number, not "2.5"'),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25 and 0.5; remove the wrong one"),
        ({"partial_rotary_factor": 2, "rope_parameters": None}, "partial_rotary_factor is 2, more than 1"),
        ({"rope_parameters": YARN, "partial_rotary_factor": None}, "rope_type yarn turns whole heads here, not 0.5 of each"),
        ({"num_nextn_predict_layers": "1"}, 'num_nextn_predict_layers must be 0 or a positive integer, not "1"'),
        ({"use_qk_norm": 1}, "use_qk_norm must be true or false, not 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(hf_models, tmp_path, change, sentence):
    folder = with_config(hf_models["glm4_moe"], tmp_path / "changed", change)
    with pytest.raises(UserError) as caught:
        read_architecture(folder)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_absent_fields_are_what_transformers_takes(hf_models, tmp_path):
    optional = ("first_k_dense_replace", "n_shared_experts", "routed_scaling_factor", "partial_rotary_factor", "use_qk_norm")
    optional += ("n_group", "topk_group", "norm_topk_prob")
    change = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    folder = with_config(hf_models["glm4_moe"], tmp_path / "short", change, without=optional)
    found, theirs = read_architecture(folder), AutoConfig.from_pretrained(folder)
    assert found.experts is not None and theirs.norm_topk_prob and theirs.n_group == theirs.topk_group == 1
    assert found.experts.dense_layers == frozenset(range(theirs.first_k_dense_replace))
    assert found.experts.shared_size == theirs.n_shared_experts * theirs.moe_intermediate_size
    assert found.experts.scaling_factor == theirs.routed_scaling_factor
    assert found.rotary_fraction == theirs.rope_parameters["partial_rotary_factor"] and found.qk_norm == theirs.use_qk_norm
    with pytest.raises(UserError, match="attention_bias is false"):
        read_architecture(with_config(hf_models["glm4_moe"], tmp_path / "unbiased", {}, without=("attention_bias",)))


_MIXTURES = ("Glm4MoeMoE", "DeepseekV3MoE")


class Told(test_routing_replay.Told):
    """Makes transformers' GLM, or DeepSeek, choose the given experts."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.routing: Tensor | None = None
        for index, block in enumerate(module for module in model.modules() if type(module).__name__ in _MIXTURES):
            block.route_tokens_to_experts = lambda logits, block=block, index=index: self._choose(block, index, logits)

    def _choose(self, block: Any, index: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        chosen = (scores + block.gate.e_score_correction_bias).topk(block.top_k).indices
        told = self.routing[:, index].long()
        chosen[: len(told)] = told
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * block.routed_scaling_factor


def test_a_balancing_loss_is_refused_beside_the_biases(hf_models):
    arch = read_architecture(hf_models["glm4_moe"])
    config = load_config(None, ["train.moe_aux_loss_coef=0.1", "train.routing_replay=true"])
    with pytest.raises(UserError, match=r"^m balances its experts by a bias per expert, which train\.moe_aux_loss_coef would"):
        check_architecture("m", arch, config, 1)
    check_architecture("m", arch, load_config(None, ["train.routing_replay=true"]), 1)


def test_replayed_experts_are_weighted_by_their_scores_without_the_bias(gangs, hf_models, monkeypatch):
    monkeypatch.setattr(test_routing_replay, "Told", Told)
    routing = test_routing_replay.random_routing(len(BIASES))
    test_routing_replay.check(gangs, hf_models["glm4_moe"], routing, test_routing_replay.LAYOUTS["cp2_ep2"])
