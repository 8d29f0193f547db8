"""The policy in bf16: parameters in bf16, the head's gradient in Megatron's fp32 buffer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.hf_models import random_sequences
from tests.policy_jobs import build, make_batch


def head_gradient(model: str, sequences: list, overrides: list[str]) -> dict:
    """This rank's fp32 head gradient after one update, the dtypes of weight and gradient, and whether the weight changed."""
    policy = build(model, ["train.lr=1e-2", "train.clip_grad=0", "train.head_chunk_rows=9", *overrides])
    weight = policy.chunks[-1].head_weight()
    before = weight.detach().clone()
    old = policy.logprobs(sequences).logp
    policy.update(replace(make_batch(sequences), old_logp=old))
    return {
        "dtypes": (weight.dtype, weight.main_grad.dtype),
        "grad": weight.main_grad.float().clone(),
        "moved": bool((weight != before).any()),
    }


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(1, ["parallel.tp=1"]), (2, ["parallel.tp=2", "parallel.sequence_parallel=true"])],
    ids=["tp1", "tp2_sp"],
)
def test_bf16_gradients_of_the_head_are_summed_in_fp32_and_near_those_of_fp32(gangs, hf_models, world, overrides):
    sequences = random_sequences()
    job = {"model": hf_models["qwen3"], "sequences": sequences}
    wanted = gangs(1).run("tests.test_policy_bf16:head_gradient", **job, overrides=["parallel.tp=1"])[0]["grad"]
    replies = gangs(world).run("tests.test_policy_bf16:head_gradient", **job, overrides=[*overrides, "model.dtype=bfloat16"])
    for reply in replies:
        assert reply["dtypes"] == (torch.bfloat16, torch.float32) and reply["moved"]
    found = torch.cat([reply["grad"] for reply in replies])[: len(wanted)]
    assert (found[:301] - wanted[:301]).norm() < 0.1 * wanted[:301].norm()
    # Sums over several chunks of bf16 products have values that bf16 itself cannot hold.
    assert (found.bfloat16().float() != found).any()


def hidden_gradient(model: str, sequences: list, overrides: list[str]) -> torch.Tensor:
    """The gradient that the last norm receives from the head in one update, bf16 [T (/ TP), H]."""
    policy, found = build(model, ["model.dtype=bfloat16", "train.head_chunk_rows=9", *overrides]), []
    policy.chunks[-1].decoder.final_layernorm.register_full_backward_hook(lambda *seen: found.append(seen[2][0][:, 0].clone()))
    policy.update(replace(make_batch(sequences), old_logp=policy.logprobs(sequences).logp))
    return torch.cat(found)


def test_sequence_parallelism_changes_no_bit_of_the_hidden_gradient(gangs, hf_models):
    """It is summed over the shards in fp32 and rounded once; partial sums in bf16 would differ."""
    job = {"model": hf_models["qwen3"], "sequences": random_sequences()}
    one = "train.tokens_per_microbatch=100000"
    whole, other = gangs(2).run("tests.test_policy_bf16:hidden_gradient", **job, overrides=["parallel.tp=2", one])
    parts = gangs(2).run(
        "tests.test_policy_bf16:hidden_gradient", **job, overrides=["parallel.tp=2", "parallel.sequence_parallel=true", one]
    )
    assert whole.dtype == torch.bfloat16 and torch.equal(whole, other) and whole.any()
    assert torch.equal(torch.cat(parts)[: len(whole)], whole)


def test_a_mixture_trains_in_bf16_with_its_experts_spread(gangs, hf_models):
    job = {"function": "tests.policy_jobs:train", "model": hf_models["qwen3_moe"], "sequences": random_sequences()}
    options = ["parallel.tp=1", "train.lr=1e-2", "train.adam_eps=1e-3"]
    wanted = gangs(1).run(**job, overrides=options)[0]
    for found in gangs(2).run(**job, overrides=[*options, "parallel.ep=2", "model.dtype=bfloat16"]):
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.02)
        assert found["loss"] == pytest.approx(wanted["loss"], abs=0.005)
        for name in ("model.layers.2.mlp.experts.5.down_proj.weight", "model.layers.0.mlp.gate.weight"):
            assert found["weights"][name].dtype == torch.bfloat16
            difference = found["weights"][name].float() - wanted["weights"][name]
            assert difference.norm() < 0.05 * wanted["weights"][name].norm()


def test_gradients_can_be_summed_in_bf16(gangs, hf_models):
    job = {"function": "tests.test_policy_bf16:head_gradient", "model": hf_models["qwen3"], "sequences": random_sequences()}
    (wanted,) = gangs(1).run(**job, overrides=["parallel.tp=1"])
    for found in gangs(2).run(**job, overrides=["parallel.tp=1", "model.dtype=bfloat16", "train.grads_dtype=bfloat16"]):
        assert found["dtypes"] == (torch.bfloat16, torch.bfloat16) and found["moved"]
        assert (found["grad"][:301] - wanted["grad"][:301]).norm() < 0.1 * wanted["grad"][:301].norm()


def router_types(model: str, sequences: list, overrides: list[str]) -> set[torch.dtype]:
    """Dtypes of the logits that the experts' routers compute."""
    policy, found = build(model, ["parallel.tp=1", "model.dtype=bfloat16", *overrides]), set()
    for layer in policy.chunks[0].decoder.layers:
        routing = layer.mlp.router.routing

        def watched(logits: torch.Tensor, *args, routing=routing, **options):
            found.add(logits.dtype)
            return routing(logits, *args, **options)

        layer.mlp.router.routing = watched
    policy.logprobs(sequences)
    return found


@pytest.mark.parametrize(("value", "dtype"), [("false", torch.bfloat16), ("true", torch.float32)])
def test_the_router_of_a_bf16_mixture_can_compute_in_fp32(gangs, hf_models, value, dtype):
    (found,) = gangs(1).run(
        "tests.test_policy_bf16:router_types",
        model=hf_models["qwen3_moe"],
        sequences=random_sequences(),
        overrides=[f"train.moe_router_fp32={value}"],
    )
    assert found == {dtype}
