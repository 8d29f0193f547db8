"""Jobs that gang ranks run for tests/test_mbridge.py: the mbridge package on Megatron models that we built and loaded."""

from __future__ import annotations

import re
from typing import ClassVar
from unittest import mock

import torch
from transformers import AutoConfig

from etr_megatron.policy.parallel import Layout
from tests.policy_jobs import build

_LOCAL_EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")


class _Named(torch.nn.Module):
    """Our model under the parameter names of Transformer Engine's spec, the only ones that mbridge supports.

    Independent of the weight map, as this is the oracle.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = model.decoder
        self._inner = [model]

    def _renamed(self, name: str) -> str:
        name = _LOCAL_EXPERT.sub(r".mlp.experts.\2.weight\1", name)
        if hasattr(self.decoder.layers[0].self_attention, "linear_kv_up_proj"):
            name = re.sub(r"\.self_attention\.(q|kv)_layernorm\.", r".self_attention.linear_\1_up_proj.layer_norm_", name)
        else:
            name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
        layer = re.match(r"decoder\.layers\.(\d+)\.pre_mlp_layernorm\.weight", name)
        if layer and not hasattr(self.decoder.layers[int(layer[1])].mlp, "router"):
            name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
        return name

    def named_parameters(self, *args, **kwargs):
        for name, parameter in self._inner[0].named_parameters(*args, **kwargs):
            yield self._renamed(name), parameter

    def state_dict(self, *args, **kwargs):
        return {self._renamed(name): value for name, value in self._inner[0].state_dict(*args, **kwargs).items()}


def _bridge(model_dir: str, padded_vocab: int, layout: Layout):
    from mbridge.core import LLMBridge
    from mbridge.core.bridge import _MODEL_REGISTRY

    hf_config = AutoConfig.from_pretrained(model_dir)
    hf_config.rope_theta, hf_config.rope_scaling = hf_config.rope_parameters["rope_theta"], None  # where older versions had it
    family = _MODEL_REGISTRY[hf_config.model_type]
    options = dict(use_cpu_initialization=True, sequence_parallel=False, persist_layer_norm=False)
    options |= dict(bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False)

    class Bridge(family):
        # Only some of the package's families support tied heads, and they modify a dictionary that all bridges share.
        _DIRECT_MAPPING: ClassVar = family._DIRECT_MAPPING | (
            {"output_layer.weight": "model.embed_tokens.weight"} if hf_config.tie_word_embeddings else {}
        )
        # The Qwen3-MoE bridge has no dense layers; they are the same as in the dense family.
        _MLP_MAPPING: ClassVar = {**_MODEL_REGISTRY["qwen3"]._MLP_MAPPING, **family._MLP_MAPPING}

        _get_safetensor_io = LLMBridge._get_safetensor_io  # the DeepSeek bridge reads bf16 alone

        def _build_base_config(self, *args, **kwargs):
            kwargs.pop("max_position_embeddings", None)  # the DeepSeek bridge sets what Megatron's config had once
            return super()._build_base_config(*args, **{**kwargs, **options})

    bridge = Bridge(hf_config, dtype=torch.float32, make_vocab_size_divisible_by=128 * layout.tp)
    bridge.vocab_size, bridge.padded_vocab_size = hf_config.vocab_size, padded_vocab
    return bridge


def exports(model: str, overrides: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All weights by HF name from the same loaded model: mbridge's, ours."""
    policy = build(model, overrides)
    bridge = _bridge(model, policy.chunks[-1].vocab_shard.size * policy.layout.tp, policy.layout)
    # mbridge asks CUDA for the device of received tensors.
    with mock.patch("torch.cuda.current_device", lambda: torch.device("cpu")), torch.no_grad():
        theirs = {name: tensor.clone() for name, tensor in bridge.export_weights([_Named(policy.chunks[0])])}
    return theirs, {name: tensor.clone() for name, tensor in policy.export()}


def cross_load(model: str, overrides: list[str]) -> dict[str, bool]:
    """Whether each parameter that mbridge loads from the checkpoint equals ours bit for bit, by name."""
    policy = build(model, overrides)
    mine = {name: parameter.detach().clone() for name, parameter in policy.chunks[0].named_parameters()}
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.fill_(-7.0)
        bridge = _bridge(model, policy.chunks[-1].vocab_shard.size * policy.layout.tp, policy.layout)
        with mock.patch("torch.cuda.current_device", lambda: torch.device("cpu")):
            bridge.load_weights([_Named(policy.chunks[0])], model)
    return {name: torch.equal(parameter, mine[name]) for name, parameter in policy.chunks[0].named_parameters()}
