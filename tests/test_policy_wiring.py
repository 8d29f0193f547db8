"""What no run on CPU shows: Megatron's settings with Transformer Engine, and the composition of microbatches."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from etr_megatron.config import Config, Fp8Config, load_config, resolve
from etr_megatron.platform import megatron_fixes
from etr_megatron.policy import Layout, Policy, model_config
from etr_megatron.policy import policy as policy_module
from etr_megatron.policy.model_config import TransformerConfig, transformer_config, uses_transformer_engine
from etr_megatron.policy.packing import Microbatch
from etr_megatron.types import TokenSequence
from etr_megatron.weights import read_architecture, weights_of
from tests.test_policy_fp8 import ONE_RANK

TRANSFORMER_ENGINE = "transformer_engine"


def on_machine(monkeypatch, *packages: str, platform: str = "cuda") -> None:
    """A machine with these packages only, as far as our code and Megatron's settings check."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None):
        if name == TRANSFORMER_ENGINE:
            return object() if name in packages else None
        return find_spec(name, package)

    monkeypatch.setenv("ETR_PLATFORM", platform)
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr("megatron.core.transformer.transformer_config.is_te_min_version", lambda *_args, **_options: True)
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", object())


def told(model: str, layout: Layout = ONE_RANK, **options) -> TransformerConfig:
    return transformer_config(read_architecture(model), layout, sequence_parallel=False, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize(
    ("platform", "packages", "used"),
    [("cuda", [TRANSFORMER_ENGINE], True), ("cuda", [], False), ("cpu", [TRANSFORMER_ENGINE], False)],
)
def test_transformer_engine_is_used_on_cuda_where_it_is_installed_and_computes_a_ranks_experts_in_one(
    hf_models, monkeypatch, platform, packages, used
):
    on_machine(monkeypatch, *packages, platform=platform)
    assert uses_transformer_engine() == used
    assert told(hf_models["qwen3_moe"]).moe_grouped_gemm == used
    assert not told(hf_models["qwen3"]).moe_grouped_gemm
    fusions = ("persist_layer_norm", "bias_dropout_fusion", "bias_activation_fusion", "apply_rope_fusion")
    assert [getattr(told(hf_models["qwen3"]), name) for name in fusions] == [used] * len(fusions)


@pytest.mark.parametrize("used", [True, False])
def test_gradients_are_added_up_in_their_product_where_transformer_engine_is_and_apex_is_not_needed(
    hf_models, monkeypatch, used
):
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import layers

    on_machine(monkeypatch, *[TRANSFORMER_ENGINE] * used)
    monkeypatch.setattr(transformer_engine, "HAVE_TE", used)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)  # as without apex
    megatron_fixes._mend_gradient_accumulation_fusion()
    config = told(hf_models["qwen3"])
    assert config.gradient_accumulation_fusion == used == layers._grad_accum_fusion_available


@pytest.mark.parametrize(
    ("family", "recipe", "padded"),
    [("qwen3_moe", "blockwise", True), ("qwen3_moe", "none", False), ("qwen3", "blockwise", False)],
)
def test_in_fp8_each_experts_tokens_are_padded(hf_models, monkeypatch, family, recipe, padded):
    on_machine(monkeypatch, TRANSFORMER_ENGINE)
    assert told(hf_models[family], fp8=Fp8Config(recipe=recipe)).moe_router_padding_for_quantization == padded


def parameters_in(part: Any, name: str = "") -> set[str]:
    """Names of the parameters of Transformer Engine's layers in a layer's spec; without the package, stand-ins are in it."""
    from megatron.core.extensions import transformer_engine as te  # only after etr_megatron.policy has prepared it

    if hasattr(part, "submodules"):
        inner = vars(part.submodules) if part.submodules else {}
        return {found for child, one in inner.items() for found in parameters_in(one, f"{name}{child}.")}
    fused = part is te.TELayerNormColumnParallelLinear
    layers = (te.TENorm, te.TELinear, te.TEColumnParallelLinear, te.TERowParallelLinear)
    own = ("layer_norm_weight", "weight") if fused else ("weight",) * any(part is one for one in layers)
    return {name + one for one in own}


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe", "deepseek_v3", "glm4_moe_lite"])
def test_the_map_names_what_transformer_engines_layers_have(hf_models, monkeypatch, family):
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs

    on_machine(monkeypatch, TRANSFORMER_ENGINE)
    monkeypatch.setattr(provider, "is_te_min_version", lambda *_args, **_options: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    arch, config = read_architecture(hf_models[family]), told(hf_models[family])
    unused = set()
    if arch.latent:  # a model has one or the other
        unused = {"linear_q_proj"} if arch.latent.q_rank else {"linear_q_down_proj", "linear_q_up_proj"}
    for layer in range(arch.layers):
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts if arch.has_experts(layer) else None,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
        wanted = {name for name in parameters_in(spec) if unused.isdisjoint(name.split("."))}
        begin = f"decoder.layers.{layer}."
        named = {weight.te.removeprefix(begin) for weight in weights_of(arch) if weight.te.startswith(begin)}
        assert {name for name in named if not re.search(r"\.experts\.|\.router\.|bias$", name)} == wanted


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite"])
def test_latent_attention_is_not_turned_by_megatrons_fused_kernel(hf_models, monkeypatch, family):
    on_machine(monkeypatch, TRANSFORMER_ENGINE)
    assert not told(hf_models[family]).apply_rope_fusion


@pytest.mark.parametrize("exchange", ["p2p", "a2a"])
def test_megatron_is_told_how_context_parallel_ranks_exchange(hf_models, exchange):
    layout = replace(ONE_RANK, world=2, cp=2)
    assert told(hf_models["qwen3"], layout, cp_comm=exchange).cp_comm_type == exchange


def test_a_policy_hands_on_all_settings_of_the_model(hf_models, monkeypatch):
    class BuiltUpTo(Exception):
        pass

    def refuse(arch, layout, **options):
        raise BuiltUpTo(options)

    monkeypatch.setattr(policy_module, "require_fp8", lambda fp8: None)
    monkeypatch.setattr(model_config, "transformer_config", refuse)
    config = configured(
        *("parallel.tp=2", "parallel.cp=2", "parallel.cp_comm=a2a", "parallel.sequence_parallel=true", "fp8.recipe=mxfp8"),
        *("train.recompute=full", "train.moe_aux_loss_coef=0.25", "train.moe_router_fp32=true"),
        "train.megatron.moe_permute_fusion=true",
    )
    with pytest.raises(BuiltUpTo) as reached:
        Policy(read_architecture(hf_models["qwen3_moe"]), hf_models["qwen3_moe"], config, ONE_RANK)
    (options,) = reached.value.args
    assert options == dict(
        sequence_parallel=True,
        dtype=torch.bfloat16,
        recompute="full",
        cp_comm="a2a",
        aux_loss_coef=0.25,
        router_fp32=True,
        fp8=Fp8Config(recipe="mxfp8"),
        fields={"moe_permute_fusion": True},
    )


def configured(*overrides: str) -> Config:
    return resolve(load_config(None, ["model.path=somewhere", *overrides]), 4, cuda=True)


def microbatches(model: str, config: Config, layout: Layout, sequences: list) -> list[Microbatch]:
    """The microbatches of a policy that has no other attributes than these."""
    policy = object.__new__(Policy)
    policy.arch, policy.config, policy.layout = read_architecture(model), config, layout
    return policy._microbatches([TokenSequence(*one) for one in sequences])


@pytest.mark.parametrize(
    ("recipe", "sequence_parallel", "tokens"),
    [("none", "false", 5), ("none", "true", 6), ("blockwise", "false", 128), ("blockwise", "true", 256)],
)
def test_a_microbatch_is_padded_to_what_fp8_and_sequence_parallelism_need(hf_models, recipe, sequence_parallel, tokens):
    config = configured("parallel.tp=2", f"fp8.recipe={recipe}", f"parallel.sequence_parallel={sequence_parallel}")
    layout = replace(ONE_RANK, world=2, tp=2)
    (batch,) = microbatches(hf_models["qwen3"], config, layout, [([7, 8, 9], [1, 2])])
    assert batch.tokens.shape == (1, tokens)


def shared_out(model: str, sizes: list[tuple[int, ...]]) -> list[Microbatch]:
    """The only microbatch of each of two ranks. sizes: of prompts and responses, and of replies at the end of these."""
    found = []
    for rank in range(2):
        layout = replace(ONE_RANK, rank=rank, world=2, dp=2, dp_rank=rank)
        sequences = [([1] * n, [2] * m, [1] * (m - sum(replies)) + [0] * sum(replies)) for n, m, *replies in sizes]
        found += microbatches(model, configured("train.tokens_per_microbatch=512"), layout, sequences)
    return found


def test_ranks_get_as_many_rows_of_logits_where_samples_are_equally_long(hf_models):
    # By tokens alone, the first sample would go with the third.
    batches = shared_out(hf_models["qwen3"], [(60, 1), (1, 60), (60, 1), (1, 60)])
    assert [len(batch.rows) for batch in batches] == [61, 61]


def test_ranks_get_as_many_rows_of_logits_where_replies_are_long(hf_models):
    batches = shared_out(hf_models["qwen3"], [(1, 60, 59), (1, 60), (1, 60, 59), (1, 60)])
    assert [len(batch.rows) for batch in batches] == [61, 61]


def test_a_long_sample_that_attention_makes_costly_is_a_ranks_only_one(hf_models):
    # By tokens alone, a short sample could join the long one: 90 and 60 tokens, or 60 and 90.
    batches = shared_out(hf_models["qwen3"], [(59, 1), (29, 1), (29, 1), (29, 1)])
    assert sorted(batch.samples for batch in batches) == [(0,), (1, 2, 3)]
