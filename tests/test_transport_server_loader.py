"""The loader of a server's worker on gloo ranks, into a model with a server's fused parameters, split by this file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from etr_megatron.weights import ServerLayout, TrainingLayout, read_architecture
from etr_megatron.weights.layout import shards_of
from etr_megatron.weights.quantize import quantize_blocks
from etr_megatron.weights.transport import server_loader
from tests.hf_models import write_model
from tests.test_reshard_plan import architecture


def rows(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    return tensor.chunk(tp, 0)[rank]


def columns(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    return tensor.chunk(tp, 1)[rank]


def fused_by_hand(model: str, tp: int, rank: int) -> dict[str, torch.Tensor]:
    """Names and values of a server's parameters, for a dense model whose key/value heads its TP divides."""
    hf, config = load_file(f"{model}/model.safetensors"), json.loads(Path(model, "config.json").read_text())
    padded = -(-config["vocab_size"] // 64) * 64
    found = {}
    for name, tensor in hf.items():
        if "embed_tokens" in name or "lm_head" in name:
            full = torch.zeros(padded, tensor.shape[1])
            full[: len(tensor)] = tensor
            found[name] = rows(full, tp, rank)
        elif "norm" in name:
            found[name] = tensor
        elif "o_proj" in name or "down_proj" in name:
            found[name] = columns(tensor, tp, rank)
    for layer in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for kind in ("weight", "bias"):
            if f"{attention}q_proj.{kind}" in hf:
                parts = [rows(hf[f"{attention}{x}_proj.{kind}"], tp, rank) for x in "qkv"]
                found[f"{attention}qkv_proj.{kind}"] = torch.cat(parts)
        parts = [rows(hf[f"{mlp}{x}_proj.weight"], tp, rank) for x in ("gate", "up")]
        found[f"{mlp}gate_up_proj.weight"] = torch.cat(parts)
    return found


def experts_by_hand(model: str, tp: int, ep: int, rank: int) -> dict[str, torch.Tensor]:
    """The fused expert parameters of a server that splits by EP first."""
    hf, config = load_file(f"{model}/model.safetensors"), json.loads(Path(model, "config.json").read_text())
    count = config.get("num_experts") or config["num_local_experts"]
    moe_tp, local = tp // ep, count // ep
    place, first = rank % moe_tp, rank // moe_tp * local
    found = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        if f"{prefix}0.down_proj.weight" not in hf:
            continue
        mine = range(first, first + local)
        w13 = [torch.cat([rows(hf[f"{prefix}{e}.{x}_proj.weight"], moe_tp, place) for x in ("gate", "up")]) for e in mine]
        found[prefix + "w13_weight"] = torch.stack(w13)
        found[prefix + "w2_weight"] = torch.stack([columns(hf[f"{prefix}{e}.down_proj.weight"], moe_tp, place) for e in mine])
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_tied"])
def test_a_server_receives_its_fused_parameters(gangs, hf_models, family):
    model = hf_models[family]
    found = gangs(4).run("tests.transport_jobs:serve", model=model, source=TrainingLayout(tp=2), destination=ServerLayout(tp=2))
    for rank in (0, 1):
        parameters, versions = found[2 + rank]
        wanted = fused_by_hand(model, 2, rank)
        assert parameters.keys() == wanted.keys()
        assert all(torch.equal(parameters[name], wanted[name]) for name in wanted)
        assert versions == [11, 12]


@pytest.mark.parametrize("ep", [1, 2])
def test_a_server_receives_its_experts_in_the_places_of_the_fused_parameters(gangs, hf_models, ep):
    model = hf_models["qwen3_moe"]
    source = TrainingLayout(dp=2, ep=2)
    found = gangs(4).run("tests.transport_jobs:serve", model=model, source=source, destination=ServerLayout(tp=2, ep=ep))
    for rank in (0, 1):
        wanted = experts_by_hand(model, 2, ep, rank)
        assert len(wanted) == 2 * read_architecture(model).layers
        assert all(torch.equal(found[2 + rank][0][name], wanted[name]) for name in wanted)


def test_a_quantised_server_receives_values_and_scales(gangs, hf_models):
    model = hf_models["llama"]
    layouts = dict(source=TrainingLayout(tp=2), destination=ServerLayout(tp=2))
    found = gangs(4).run("tests.transport_jobs:serve", model=model, **layouts, fp8_block=8)
    for rank in (0, 1):
        parameters, wanted = found[2 + rank][0], fused_by_hand(model, 2, rank)
        for name in ("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"):
            name = f"model.layers.2.{name}"
            values, scales = quantize_blocks(wanted[name], 8)
            assert torch.equal(parameters[name], values.view(torch.uint8))
            assert torch.equal(parameters[name + "_scale_inv"], scales)


def test_a_server_of_latent_attention_stacks_the_projections_down_and_renews_what_it_derives(gangs, tmp_path):
    """In FP8, too, rows and scales of the queries' are above those of keys and values, whose 34 rows are no multiple of 8."""
    model = write_model("deepseek_v3", tmp_path, q_lora_rank=24, moe_intermediate_size=32)
    layouts = dict(source=TrainingLayout(dp=2), destination=ServerLayout())
    found = gangs(3).run("tests.transport_jobs:serve", model=model, **layouts, fp8_block=8)[2][0]
    hf, attention = load_file(f"{model}/model.safetensors"), "model.layers.2.self_attn."
    down = torch.cat([hf[f"{attention}{one}.weight"] for one in ("q_a_proj", "kv_a_proj_with_mqa")])
    values, scales = quantize_blocks(down, 8)
    assert torch.equal(found[f"{attention}fused_qkv_a_proj_with_mqa.weight"], values.view(torch.uint8))
    assert torch.equal(found[f"{attention}fused_qkv_a_proj_with_mqa.weight_scale_inv"], scales)
    up = f"{attention}kv_b_proj.weight"
    assert torch.equal(found[f"derived.{up}"], quantize_blocks(hf[up], 8)[0].float() + 1)


@pytest.mark.parametrize("fault", ["middle", "before"])
def test_a_worker_takes_the_next_offer_after_a_sync_that_failed(gangs, hf_models, fault):
    model = hf_models["llama"]
    found = gangs(3).run("tests.transport_jobs:recover", model=model, destination=ServerLayout(tp=2), fault=fault)
    reason = {
        "middle": "OSError: the device fell off",
        "before": "ValueError: shards of source rank 0 do not fit: .* is missing",
    }
    for rank in (0, 1):
        parameters, errors = found[1 + rank]
        wanted = fused_by_hand(model, 2, rank)
        assert all(torch.equal(parameters[name], wanted[name]) for name in wanted)
        assert len(errors) == 1 and re.search(f"version 2 did not complete: rank 0 failed: {reason[fault]}", errors[0])


def test_parameters_of_another_shape_and_offers_of_another_version_are_refused_in_words():
    offer = server_loader.Offer(3, "localhost", 1, 0, TrainingLayout(), ServerLayout(), architecture())
    parameters = {name: torch.zeros(3, 5) for name in ("model.norm.weight", "lm_head.weight")}
    with pytest.raises(ValueError, match=r"there is no model\.embed_tokens\.weight") as refused:
        server_loader.server_shards(parameters, offer)
    parameters = {
        weight.server: torch.zeros(shape)
        for weight, shape in ((weight, shard.shape) for weight, shard in shards_of(ServerLayout(), architecture(), 0))
    }
    parameters["model.norm.weight"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"do not match the offer: model\.norm\.weight is \(7,\), not \(6,\)$"):
        server_loader.server_shards(parameters, offer)
    assert "more" in str(refused.value)
    fields = json.loads(bytes(offer.message().tolist()))
    other = torch.tensor(list(json.dumps({**fields, "colour": "blue"}).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"cannot be read \(.*colour.*\): the server and the job need the same etr_megatron"):
        server_loader.Offer.read(other)


def test_an_offer_survives_its_journey_as_a_tensor(hf_models):
    for arch in (architecture(), *(read_architecture(hf_models[name]) for name in ("qwen3_moe", "llama", "deepseek_v3"))):
        offer = server_loader.Offer(3, "node7", 1234, 1, TrainingLayout(tp=2, pp=2), ServerLayout(tp=2), arch, fp8_block=128)
        message = offer.message()
        assert message.dtype == torch.uint8 and message.dim() == 1
        assert server_loader.Offer.read(message) == offer


def test_other_tensors_and_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match=r"accepts only the tensor etr_megatron\.sync_offer, not lm_head"):
        server_loader.receive(torch.nn.Linear(2, 2), {"lm_head": torch.ones(2)})
    offer = server_loader.Offer(3, "localhost", 1, 0, TrainingLayout(), ServerLayout(), architecture())
    with pytest.raises(ValueError, match=r"do not match the offer: there is no model\.embed_tokens\.weight; .*; and \d+ more$"):
        server_loader.receive(torch.nn.Linear(2, 2), {server_loader.MESSAGE_NAME: offer.message()})


@pytest.mark.parametrize("order", ["load_up_proj_weight_first", "w13_swiglu_interleaved", "use_flashinfer_trtllm_moe"])
def test_experts_that_a_server_keeps_in_an_order_of_its_own_are_refused_though_their_shapes_are_the_same(hf_models, order):
    arch = read_architecture(hf_models["qwen3_moe"])
    offer = server_loader.Offer(3, "localhost", 1, 0, TrainingLayout(), ServerLayout(), arch, timeout_s=1)
    model = torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2)})
    model["experts"].quant_method = SimpleNamespace()
    flagged = model["experts"] if order.startswith("use_") else model["experts"].quant_method
    setattr(flagged, order, True)
    with pytest.raises(server_loader.ShardMismatchError, match=rf"keeps the experts of experts in its own order \({order}\)"):
        server_loader.receive(model, {server_loader.MESSAGE_NAME: offer.message()})
    setattr(flagged, order, False)
    with pytest.raises(server_loader.ShardMismatchError, match=r"there is no model\.embed_tokens\.weight"):
        server_loader.receive(model, {server_loader.MESSAGE_NAME: offer.message()})


def test_a_server_that_has_made_a_shared_expert_a_routed_one_is_told_the_argument_that_it_lacks(hf_models):
    arch = read_architecture(hf_models["glm4_moe"])
    offer = server_loader.Offer(3, "localhost", 1, 0, TrainingLayout(), ServerLayout(), arch)
    parameters = {}
    for weight, shard in shards_of(ServerLayout(), arch, 0):
        if ".shared_experts." not in weight.server:
            parameters[weight.server] = torch.zeros(shard.shape if weight.expert is None else (8, *shard.shape))
    with pytest.raises(server_loader.ShardMismatchError, match=r"; start it with --disable-shared-experts-fusion$"):
        server_loader.server_shards(parameters, offer)


def test_the_loader_imports_neither_megatron_nor_a_server():
    program = (
        "import sys, etr_megatron.weights.transport.server_loader\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'sglang', 'transformers')])"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
