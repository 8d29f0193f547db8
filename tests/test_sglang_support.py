"""Models that servers cannot split, or do not serve, are refused before any server is started."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from etr_megatron.config import Config, RolloutConfig, SglangConfig
from etr_megatron.errors import UserError
from etr_megatron.sglang_support import check_sglang_support
from etr_megatron.weights import Architecture, Experts, LatentAttention
from tests.test_checks import config, refusal, with_model

__all__ = ["config"]  # a fixture


def test_servers_that_cannot_cut_the_models_heads_are_refused_before_they_are_started(config: Config, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "configs" / "models" / "Qwen2.5-Math-7B" / "config.json"
    (tmp_path / "config.json").write_text(shipped.read_text())
    rollout, sglang = RolloutConfig(backend="sglang"), SglangConfig(tp=8)
    message = refusal(replace(with_model(config, tmp_path), rollout=rollout, sglang=sglang))
    assert "has 28 attention heads, which sglang.tp=8 does not divide, and a server would refuse to start" in message


@pytest.mark.parametrize(
    ("family", "servers", "sentence"),
    [
        ("qwen2", dict(tp=2, dp_attention=2), "is a qwen2 model, of which SGLang would compute wrong outputs with data-"),
        ("qwen3", dict(tp=6, dp_attention=2), "has 4 attention heads, which the 3 GPUs of each of sglang.dp_attention=2 "),
        ("qwen3", dict(tp=2, ep=2), "has no experts to spread over sglang.ep=2; set sglang.ep to 1"),
        ("qwen3_moe", dict(tp=4, ep=4), "has 6 experts, which sglang.ep=4 does not divide, and a server would refuse to start"),
        ("qwen3_moe_wide", dict(tp=4, ep=2), "has experts of width 27, which the 2 ranks of each (sglang.tp=4 / sglang.ep=2)"),
        ("qwen3_moe_dense", dict(), "has experts and dense layers (mlp_only_layers, decoder_sparse_step), which SGLang's"),
        ("qwen3_moe_tied", dict(), "has experts and tied embeddings (tie_word_embeddings), which SGLang's Qwen3-MoE does"),
        ("glm4_moe_tied", dict(), "has experts and tied embeddings (tie_word_embeddings), which SGLang's GLM-4.5 does"),
        (
            "glm4_moe_lite_tied",
            dict(),
            "has experts and tied embeddings (tie_word_embeddings), which SGLang's GLM-4.7-Flash does",
        ),
        (
            "glm4_moe_lite",
            dict(),
            "has experts and queries without a latent (q_lora_rank of null), which SGLang's GLM-4.7-Flash",
        ),
        ("glm4_moe_wide", dict(tp=4, ep=4), "has a shared expert of width 42, which sglang.tp=4 does not divide, and a server"),
    ],
)
def test_models_that_servers_cannot_cut_or_do_not_serve_are_refused_before_they_are_started(
    config: Config, hf_models: dict[str, str], tmp_path: Path, family: str, servers: dict, sentence: str
) -> None:
    changes = {
        "qwen3_moe_wide": {"moe_intermediate_size": 27},
        "qwen3_moe_tied": {"tie_word_embeddings": True},
        "glm4_moe_wide": {"n_routed_experts": 8, "moe_intermediate_size": 21},
        "glm4_moe_tied": {"tie_word_embeddings": True},
        "glm4_moe_lite_tied": {"tie_word_embeddings": True, "q_lora_rank": 22},
    }.get(family, {})
    shipped = hf_models[family.rsplit("_", 1)[0] if changes else family]
    (tmp_path / "config.json").write_text(json.dumps(json.loads(Path(shipped, "config.json").read_text()) | changes))
    asked = replace(with_model(config, tmp_path), rollout=RolloutConfig(backend="sglang"), sglang=SglangConfig(**servers))
    assert f"the model in {tmp_path} {sentence}" in refusal(asked)
    embedded = refusal(replace(asked, rollout=RolloutConfig()))
    assert "SGLang" not in embedded and "sglang." not in embedded


@pytest.mark.parametrize(
    ("changes", "tp", "sentence"),
    [
        ({}, 1, "sglang.fp8: model.layers.0.self_attn.q_proj.weight is split into parts of 64 x 48 by sglang.tp=1, "),
        (dict(hidden_size=128, head_dim=128, intermediate_size=127), 2, "a server cannot split the model"),
    ],
    ids=["blocks", "rows"],
)
def test_what_fp8_servers_cannot_split_is_refused_before_they_are_started(
    config: Config, hf_models: dict[str, str], tmp_path: Path, changes: dict, tp: int, sentence: str
) -> None:
    shipped = Path(hf_models["qwen3"], "config.json")
    (tmp_path / "config.json").write_text(json.dumps(json.loads(shipped.read_text()) | changes))
    asked = replace(with_model(config, tmp_path), rollout=RolloutConfig(backend="sglang"), sglang=SglangConfig(fp8=True, tp=tp))
    assert refusal(asked).startswith(sentence)
    assert "sglang.fp8" not in refusal(replace(asked, sglang=SglangConfig(tp=tp)))


def latent(hidden: int, heads: int, kind: LatentAttention, dense: int, wide: int) -> Architecture:
    """GLM-4.7-Flash or DeepSeek-V3 with two layers of eight experts. dense, wide: of the first layer and of an expert."""
    experts = Experts(8, 4, wide, True, frozenset({0}), wide, "sigmoid", True)
    sizes = dict(layers=2, hidden_size=hidden, intermediate_size=dense, heads=heads, kv_heads=heads, head_dim=kind.head_dim)
    rest = dict(vocab_size=1280, tied_embeddings=False, norm_eps=1e-6, max_positions=64, experts=experts, latent=kind)
    return Architecture("deepseek_v3", **sizes, **rest)


FLASH = latent(2048, 20, LatentAttention(512, 768, 192, 64, 256), 10240, 1536)
DEEPSEEK = latent(7168, 128, LatentAttention(512, 1536, 128, 64, 128), 18432, 2048)


@pytest.mark.parametrize(("arch", "tps"), [(FLASH, (1, 2, 4)), (DEEPSEEK, (1, 2, 4, 8, 16))], ids=["flash", "deepseek"])
def test_fp8_servers_hold_latents_that_end_within_a_block_but_no_head_that_does(
    arch: Architecture, tps: tuple[int, ...]
) -> None:
    """576 rows project down to the latents of keys and values, below 768 or 1536 for those of queries."""
    for tp in tps:
        if arch is FLASH and tp == 4:  # five heads of 448 rows
            with pytest.raises(UserError, match=r"kv_b_proj\.weight is split into parts of 2240 x 512 .*; lower sglang\.tp"):
                check_sglang_support("m", arch, SglangConfig(tp=tp, fp8=True))
        else:
            check_sglang_support("m", arch, SglangConfig(tp=tp, fp8=True))
        check_sglang_support("m", arch, SglangConfig(tp=tp, dp_attention=tp, fp8=True))  # heads are not split
    with pytest.raises(UserError, match=r"; lower sglang\.tp, or raise .* or sglang\.dp_attention for attention$"):
        check_sglang_support("m", replace(FLASH, intermediate_size=1536), SglangConfig(tp=12, dp_attention=3, fp8=True))
    narrow = replace(arch, latent=replace(arch.latent, q_rank=700))
    with pytest.raises(UserError, match=re.escape("q_a_proj.weight is split into parts of 700 x ")):
        check_sglang_support("m", narrow, SglangConfig(fp8=True))
    check_sglang_support("m", narrow, SglangConfig())
