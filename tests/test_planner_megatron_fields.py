"""Plans and dry runs of configs with `train.megatron`."""

from __future__ import annotations

import pytest

from etr_megatron.config import load_config
from etr_megatron.errors import UserError
from etr_megatron.planner import make_plan
from etr_megatron.planner.dry_run import check_ranks
from etr_megatron.planner.report import render
from tests.runs import REPO

FLEX = "train.megatron.moe_token_dispatcher_type=flex"
QWEN3_32B = REPO / "configs" / "qwen3_32b_32gpu.yaml"
BLOCKS = [
    "train.megatron={recompute_granularity: full, recompute_method: block, recompute_num_layers: 4}",
    "train.recompute=none",
]


def test_a_plan_counts_recomputed_layers_and_names_what_it_does_not_count():
    plans = {
        name: make_plan(load_config(QWEN3_32B, overrides), 32)
        for name, overrides in {"none": ["train.recompute=none"], "full": ["train.recompute=full"], "block": BLOCKS}.items()
    }
    kept = {name: max(rank.activations for rank in plan.ranks) for name, plan in plans.items()}
    assert kept["full"] < kept["block"] < kept["none"]
    assert plans["none"].time.train < plans["block"].time.train < plans["full"].time.train
    assert "not counted" not in render(plans["block"])
    other = make_plan(load_config(QWEN3_32B, ["train.megatron.attention_backend=flash", "train.recompute=full"]), 32)
    assert "without these fields of train.megatron, which are not counted: attention_backend)" in render(other)
    assert other.as_dict() == plans["full"].as_dict() | {"uncounted": ["train.megatron.attention_backend"]}


def test_a_dry_run_builds_without_fields_for_a_gpu_and_tells_what_megatron_refuses(hf_models):
    gpu = ["train.megatron.moe_permute_fusion=true", FLEX, "train.megatron.moe_deepep_num_sms=24", "train.moe_router_fp32=true"]
    recomputed = ["train.megatron.recompute_granularity=selective", "train.megatron.recompute_modules=[moe_act, moe]"]
    layout = [f"model.path={hf_models['qwen3_moe']}", "data.max_prompt_tokens=64", "parallel.tp=1", "parallel.ep=2"]
    check_ranks(make_plan(load_config(None, [*layout, *gpu, *recomputed]), 2), [0])
    refused = make_plan(load_config(None, [*layout, "train.megatron.recompute_granularity=full"]), 2)
    with pytest.raises(UserError, match="Megatron refuses it: Using recompute_granularity: full so recompute_method must be"):
        check_ranks(refused, [0])
