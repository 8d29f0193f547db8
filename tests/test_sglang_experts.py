"""Models with experts on real SGLang servers on CPU: weight syncs by every transport into split and distributed experts."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from etr_megatron.config import SglangConfig
from tests.hf_models import write_model
from tests.test_rollout import as_sets, experts_chosen
from tests.test_sglang_server import OWN, PROMPTS, PYTHON, started

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-sglang: `bash tools/setup_env.sh --sglang` makes it"),
]
_TP2 = ("parallel.tp=2", "parallel.sequence_parallel=true")
TRAINERS = {
    "ep2": ("parallel.tp=1", "parallel.ep=2"),
    "pp2": ("parallel.tp=1", "parallel.pp=2"),
    "tp2": _TP2,
    "tp2_ep2_etp1": (*_TP2, "parallel.ep=2", "parallel.etp=1"),
}
BUCKET_BYTES = 100_000
"""So few that most buckets end within a layer, which servers must not notice."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Key/value heads that TP4 divides, and MLPs and experts of a width that TP4 x 32 divides: on CPU, SGLang pads others."""
    root = tmp_path_factory.mktemp("hf")
    torch.manual_seed(3)
    sizes = dict(vocab_size=301, hidden_size=48, head_dim=8, num_hidden_layers=2, max_position_embeddings=512)
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    experts = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=128, norm_topk_prob=True)
    qwen = Qwen3MoeConfig(**sizes, **heads, **experts, initializer_range=0.1, tie_word_embeddings=False)
    Qwen3MoeForCausalLM(qwen).float().save_pretrained(root / "qwen3_moe")
    glm = dict(head_dim=8, intermediate_size=128, moe_intermediate_size=128, **heads)
    others = {name: write_model(name, root / name, **glm) for name in ("glm4_moe", "glm4_moe_air")}
    latent = dict(intermediate_size=128, moe_intermediate_size=128, q_lora_rank=22)
    others |= {name: write_model(name, root / name, **latent) for name in ("deepseek_v3", "glm4_moe_lite")}
    return {"qwen3_moe": str(root / "qwen3_moe"), **others}


@pytest.fixture(scope="module")
def url_of(models, tmp_path_factory):
    """`url_of(family, tp, ep, dp)` is the address of a running server, with data-parallel attention if dp is above 1; one runs
    at a time. It starts from a config.json only, so that all weights come by a sync."""
    with ExitStack() as stack:
        running: dict[tuple[str, int, int, int], str] = {}

        def get(family: str, tp: int, ep: int, dp: int = 1) -> str:
            if (family, tp, ep, dp) not in running:
                stack.close()
                running.clear()
                folder = tmp_path_factory.mktemp("sglang")
                shutil.copy(Path(models[family]) / "config.json", folder)
                config = SglangConfig(**OWN, tp=tp, ep=ep, dp_attention=dp, sync="sharded")
                running[family, tp, ep, dp] = stack.enter_context(started(config, str(folder), folder, routing=True)).url
            return running[family, tp, ep, dp]

        yield get


def least_bytes(model: str, tp: int, dp: int = 1) -> int:
    """Bytes of a sync in fp32 that the workers of a server need: all of norms, routers and projections down to latents, their
    share of everything else, once in each of `dp` groups if it is of attention or the embedding. An expert is on one worker, or
    split over some, for any EP."""
    tensors, whole = load_file(f"{model}/model.safetensors"), ("norm", "mlp.gate.", "_a_proj")
    shared = {name: dp if ".self_attn." in name or "embed_tokens" in name else 1 for name in tensors}
    return sum(
        tensor.nbytes * (tp if any(part in name for part in whole) else shared[name]) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize(
    ("family", "tp", "ep", "sync", "trainer"),
    [
        ("qwen3_moe", 2, 2, "broadcast", "pp2"),
        ("qwen3_moe", 2, 2, "tensor", "ep2"),
        ("qwen3_moe", 2, 2, "disk", "ep2"),
        ("qwen3_moe", 2, 2, "sharded", "tp2"),
        ("glm4_moe", 2, 2, "tensor", "ep2"),
        ("glm4_moe", 2, 2, "sharded", "tp2"),
        ("glm4_moe_air", 2, 1, "broadcast", "tp2"),
        ("glm4_moe_air", 2, 1, "sharded", "pp2"),
        ("glm4_moe_lite", 1, 1, "broadcast", "tp2"),
        ("glm4_moe_lite", 1, 1, "sharded", "pp2"),
        ("deepseek_v3", 2, 2, "broadcast", "ep2"),
        ("deepseek_v3", 2, 2, "disk", "pp2"),
        ("deepseek_v3", 2, 2, "sharded", "tp2_ep2_etp1"),
    ],
)
def test_after_every_weight_sync_a_server_with_experts_agrees_with_the_trainer(
    gangs, models, url_of, tmp_path, family, tp, ep, sync, trainer
):
    model = models[family]
    served = dict(urls=(url_of(family, tp, ep),), tp=tp, ep=ep, sync=sync, probe_every=0)
    job = dict(model=model, directory=str(tmp_path), prompts=PROMPTS, overrides=TRAINERS[trainer], bucket_bytes=BUCKET_BYTES)
    found = gangs(2).run("tests.sglang_jobs:gaps", **served, **job)
    for rank in found:
        assert len(rank["gaps"]) == 2 and max(rank["gaps"]) < 1e-5
    if sync == "sharded":
        assert sum(rank["bytes"] for rank in found) == least_bytes(model, tp)


@pytest.mark.parametrize(
    ("family", "tp", "dp", "trainer", "layers", "per_token"),
    [("deepseek_v3", 2, 2, "pp2", 3, 4), ("qwen3_moe", 4, 1, "ep2", 2, 3)],
    ids=["whose ranks attend for requests of their own", "that splits an expert over ranks"],
)
def test_a_server_agrees_with_the_trainer_and_says_which_experts_it_chose_for_every_token_but_the_last(
    gangs, models, url_of, tmp_path, family, tp, dp, trainer, layers, per_token
):
    """A probe asks every group of ranks that attends by itself."""
    model, sizes = models[family], dict(tp=tp, ep=2, dp_attention=dp)
    served = dict(urls=(url_of(family, tp, 2, dp),), **sizes, sync="sharded", routing=True, probe_every=1 if dp > 1 else 0)
    job = dict(model=model, directory=str(tmp_path), prompts=PROMPTS, overrides=TRAINERS[trainer])
    found = gangs(2).run("tests.sglang_jobs:gaps", **served, **job)
    assert sum(rank["bytes"] for rank in found) == least_bytes(model, tp, dp)
    for rank in found:
        assert len(rank["gaps"]) == 2 and max(rank["gaps"]) < 1e-5
        assert rank["routed"] == found[0]["routed"] and len(rank["routed"]) == 2 * len(PROMPTS)
    for tokens, routing in found[0]["routed"]:
        assert as_sets(routing, layers=layers, per_token=per_token) == experts_chosen(model, tokens)[:-1]
