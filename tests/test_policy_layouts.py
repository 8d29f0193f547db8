"""Loss, gradients and updated weights in layouts with model chunks, uneven stages and context parallelism."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from tests.gang import Gangs
from tests.hf_models import random_sequences, write_model
from tests.policy_jobs import build, make_batch
from tests.test_policy_training import BASE, assert_same_run

VPP2 = ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"]
CP2 = ["parallel.tp=1", "parallel.cp=2"]
CP2_TP2 = ["parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true"]
CP2_PP2 = [*CP2, "parallel.pp=2"]
SMALL, OVERLAP, SHARDED = "train.tokens_per_microbatch=64", "train.overlap_grad_reduce=true", "train.distributed_optimizer=true"

CHUNKS = {
    "pp2_vpp2": (2, [*VPP2, SMALL]),
    "pp2_vpp2_one_microbatch": (2, VPP2),
    "pp2_vpp2_dp2_overlapped": (4, [*VPP2, SMALL, OVERLAP]),
    "pp2_vpp2_dp2_distributed_optimizer": (4, [*VPP2, SHARDED]),
    "pp2_vpp2_tp2_full_recompute": (
        4,
        [*VPP2, SMALL, "parallel.tp=2", "parallel.sequence_parallel=true", "train.recompute=full"],
    ),
    "pp2_one_layer_first": (2, ["parallel.tp=1", "parallel.pp=2", "parallel.first_stage_layers=1", SMALL]),
    "pp3_uneven": (
        3,
        ["parallel.tp=1", "parallel.pp=3", "parallel.first_stage_layers=1", "parallel.last_stage_layers=1", SMALL],
    ),
}
CONTEXT = {
    "cp2": (2, [*CP2, SMALL]),
    "cp2_one_microbatch": (2, CP2),
    "cp2_tp2_sp": (4, [*CP2_TP2, SMALL]),
    "cp2_dp2_overlapped_distributed_optimizer": (4, [*CP2, SMALL, OVERLAP, SHARDED]),
    "cp2_recompute": (2, [*CP2, "train.recompute=selective"]),
    "cp4": (4, ["parallel.tp=1", "parallel.cp=4"]),
}
MIXTURES = {
    "pp2_vpp2_ep2": (4, [*VPP2, "parallel.ep=2", SMALL]),
    "cp2_ep2": (2, [*CP2, "parallel.ep=2", SMALL]),
    "cp2_pp2_ep2": (4, [*CP2_PP2, "parallel.ep=2", SMALL]),
    # Experts are spread over the context-parallel ranks in both chunks of a stage.
    "cp2_pp2_vpp2_ep2": (4, [*CP2_PP2, "parallel.vpp=2", "parallel.ep=2", SMALL]),
    "cp2_tp2_sp_ep2_etp1": (4, [*CP2_TP2, "parallel.ep=2", "parallel.etp=1"]),
}

DEEP = {
    # With three or more stages, the previous stage is not also the next one, as it is with two.
    "pp4_vpp2": (4, ["parallel.tp=1", "parallel.pp=4", "parallel.vpp=2", SMALL]),
    # Chunks of one layer on the first and the last stage, of two layers on the one between them.
    "pp3_vpp2_uneven": (
        3,
        [
            *("parallel.tp=1", "parallel.pp=3", "parallel.vpp=2", SMALL),
            *("parallel.first_stage_layers=2", "parallel.last_stage_layers=2"),
        ],
    ),
}
# Experts are cut as TP is: with etp=1, the copies of an expert would be on the same ranks as those of a dense weight, so mixing
# up their groups would not show.
EVERYTHING = [*CP2_TP2, "parallel.pp=2", "parallel.vpp=2", "parallel.ep=2", SMALL, SHARDED]


@pytest.fixture(scope="module")
def single(gangs, hf_models):
    """A family's run in one process and one microbatch."""
    done = {}

    def get(family: str, *extra: str) -> dict:
        if (family, extra) not in done:
            (done[family, extra],) = run(gangs, hf_models[family], 1, ["parallel.tp=1", *extra])
        return done[family, extra]

    return get


@pytest.fixture(scope="module")
def deep(gangs, tmp_path_factory):
    """A model of eight layers, and its run in one process and one microbatch."""
    model = write_model("qwen3", tmp_path_factory.mktemp("deep"), layers=8)
    return model, *run(gangs, model, 1, ["parallel.tp=1"])


def run(gangs, model: str, world: int, overrides: list[str]) -> list[dict]:
    # Uneven lengths and 7 samples: ranks get different numbers of tokens, none divisible by the stages, chunks or ranks.
    return gangs(world).run("tests.policy_jobs:train", model=model, sequences=random_sequences(), overrides=[*BASE, *overrides])


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *(("qwen3", layout) for layout in (*CHUNKS, *CONTEXT) if "tp2" not in layout),
        # Its projections have biases, and its embedding is the head.
        *(("qwen2", layout) for layout in ("pp2_vpp2_tp2_full_recompute", "pp3_uneven", "cp2_tp2_sp")),
    ],
)
def test_loss_gradients_and_weights_equal_those_of_one_process(gangs, hf_models, single, family, layout):
    world, overrides = {**CHUNKS, **CONTEXT}[layout]
    for found in run(gangs, hf_models[family], world, overrides):
        assert_same_run(found, single(family))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe_dense", "pp2_vpp2_ep2"),
        ("glm4_moe", "cp2_ep2"),
        ("deepseek_v3", "cp2_pp2_ep2"),
        ("qwen3_moe", "cp2_pp2_vpp2_ep2"),
        # Chunks of context and tensor-parallel parts of a sequence meet in the rotary embedding of latent keys.
        ("deepseek_v3", "cp2_tp2_sp_ep2_etp1"),
    ],
)
def test_those_of_a_mixture_too(gangs, hf_models, single, family, layout):
    world, overrides = MIXTURES[layout]
    for found in run(gangs, hf_models[family], world, overrides):
        assert_same_run(found, single(family))


def messages_of_an_update(model: str, overrides: list[str]) -> list[tuple[list, list]]:
    """Of every message of an update: the shapes that this stage expects, and those that Megatron's stages tell each other."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from etr_megatron.policy.stage_messages import StageMessages

    known, seen = StageMessages._communicate_shapes, []

    def both(self: Any, *given: Any) -> tuple[list | None, list | None]:
        expected, told = known(self, *given), P2PCommunicator._communicate_shapes(self, *given)
        seen.append(([one or [0, 0, 0] for one in expected], [*told]))
        return expected

    with mock.patch.object(StageMessages, "_communicate_shapes", both):
        build(model, overrides).update(make_batch(random_sequences()))
    return seen


@pytest.mark.parametrize("overrides", [["parallel.vpp=1"], ["parallel.vpp=2"]])
def test_stages_know_the_shapes_of_their_messages(gangs, hf_models, overrides):
    job = dict(model=hf_models["qwen3"], overrides=["parallel.tp=1", "parallel.pp=2", *overrides, SMALL])
    for seen in gangs(2).run("tests.test_policy_layouts:messages_of_an_update", **job):
        assert all(expected == told for expected, told in seen)
        assert len({tuple(shape) for expected, _ in seen for shape in expected}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", DEEP)
def test_those_of_chunks_on_three_stages_and_more_too(gangs, deep, layout):
    world, overrides = DEEP[layout]
    model, wanted = deep
    for found in run(gangs, model, world, overrides):
        assert_same_run(found, wanted)


@pytest.mark.slow
def test_those_of_a_mixture_split_in_every_way_at_once_too(hf_models, single):
    own = Gangs()  # stopped right away: no other test of a session needs eight processes
    try:
        for found in run(own, hf_models["qwen3_moe"], 8, EVERYTHING):
            assert_same_run(found, single("qwen3_moe"))
    finally:
        own.stop()
