"""More tensor-parallel ranks than key/value heads: neighbouring ranks share a head."""

from __future__ import annotations

import pytest

from tests import test_policy_checkpoints, test_policy_gradients, test_policy_logprobs
from tests.hf_models import random_sequences, write_model

SP = "parallel.sequence_parallel=true"
LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "tp2_sp": (2, ["parallel.tp=2", SP]),
    "tp2_sp_cp2": (4, ["parallel.tp=2", SP, "parallel.cp=2"]),
    "tp2_sp_recomputed_pp2": (4, ["parallel.tp=2", SP, "parallel.pp=2", "train.recompute=full"]),
    # A rank has 24 of the 96 rows of queries, keys and values: one and a half heads.
    "tp4_sp": (4, ["parallel.tp=4", SP]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> directory of a checkpoint with one key/value head for four query heads."""
    root = tmp_path_factory.mktemp("shared_heads")
    return {name: write_model(name, root / name, num_key_value_heads=1) for name in ("qwen2", "qwen3", "qwen3_moe")}


@pytest.fixture(scope="module")
def references(models):
    done = {}

    def get(family: str) -> tuple:
        if family not in done:
            done[family] = test_policy_gradients.reference(models[family], random_sequences())
        return done[family]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), [("qwen3", "tp2_sp_cp2"), ("qwen3_moe", "tp2_sp_cp2"), ("qwen3_moe", "tp4_sp")])
def test_logprobs_and_entropy_equal_transformers(gangs, models, family, layout):
    test_policy_logprobs.check(gangs, models[family], *LAYOUTS[layout])


def test_padded_logits_equal_transformers(gangs, models):
    test_policy_logprobs.check_logits(gangs, models["qwen3"], *LAYOUTS["tp2_sp"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *(("qwen2", layout) for layout in ("tp2", "tp2_sp_recomputed_pp2", "tp4_sp")),  # biases
        *(("qwen3", layout) for layout in ("tp2_sp", "tp2_sp_cp2", "tp4_sp")),  # norms of queries and keys
    ],
)
def test_gradients_equal_autograd_through_transformers(gangs, models, references, family, layout):
    test_policy_gradients.check(gangs, models[family], references(family), LAYOUTS[layout], "single_pass")


def test_two_heads_on_four_ranks_have_the_gradients_of_transformers(gangs, hf_models):
    wanted = test_policy_gradients.reference(hf_models["qwen2"], random_sequences())
    test_policy_gradients.check(gangs, hf_models["qwen2"], wanted, LAYOUTS["tp4_sp"], "single_pass")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sharded"), [("qwen2", "true"), ("qwen3", "false")])
def test_a_checkpoint_goes_on_where_ranks_share_heads_and_back(gangs, models, tmp_path, family, sharded):
    optimizer = f"train.distributed_optimizer={sharded}"
    whole, half, quarter = (
        (world, [*layout, optimizer]) for world, layout in ((2, ["parallel.tp=1"]), LAYOUTS["tp2_sp"], LAYOUTS["tp4_sp"])
    )
    test_policy_checkpoints.check(gangs, models[family], tmp_path / "cut", whole, quarter)
    test_policy_checkpoints.check(gangs, models[family], tmp_path / "joined", quarter, half)
