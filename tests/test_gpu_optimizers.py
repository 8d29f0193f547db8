"""GPU-only optimizers, tested on CPU with the stand-ins for the GPU in `gpu_optimizer_jobs`."""

from __future__ import annotations

import pytest
import torch

from tests.gang import Gangs

pytestmark = pytest.mark.slow

TP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]
LAYOUTS = {
    "dp2": ("qwen3", ["parallel.tp=1"]),
    "ep2": ("qwen3_moe", ["parallel.tp=1", "parallel.ep=2"]),
    "pp2_first_stage_without_experts": ("qwen3_moe_dense", ["parallel.tp=1", "parallel.pp=2"]),
}
DISTRIBUTED = ["train.distributed_optimizer=true"]
KINDS = {"offloaded": ("offloaded", DISTRIBUTED), "fused": ("fused", []), "fused_distributed": ("fused", DISTRIBUTED)}


@pytest.fixture(scope="module")
def own_gangs():
    """Ranks for this file alone, because Megatron is patched in them."""
    running = Gangs("tests.gpu_optimizer_jobs")
    yield running
    running.stop()


TRAINED = [
    ("offloaded", "ep2"),
    ("offloaded", "pp2_first_stage_without_experts"),
    ("fused", "dp2"),
    ("fused", "pp2_first_stage_without_experts"),
    ("fused_distributed", "ep2"),
]


@pytest.fixture(scope="module", params=TRAINED, ids="-".join)
def trained(request, own_gangs, hf_models, tmp_path_factory):
    kind, (family, layout) = KINDS[request.param[0]], LAYOUTS[request.param[1]]
    there = str(tmp_path_factory.mktemp("run"))
    job = {"model": hf_models[family], "overrides": [*layout, *kind[1]], "there": there, "kind": kind[0]}
    return job, own_gangs(2).run("tests.gpu_optimizer_jobs:train_save_and_go_on", **job)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0, msg=name)


def test_it_updates_as_torch_does_and_each_rank_its_share(trained):
    job, ranks = trained
    if job["kind"] == "offloaded":  # vocabularies are padded; with experts on separate ranks, both ranks have norms and router
        shares, weights = [rank["apart"] for rank in ranks], sum(tensor.numel() for tensor in ranks[0]["saved"].values())
        assert min(shares) > 0.3 * weights and weights <= sum(shares) < 1.3 * weights
    for rank in ranks:
        assert [seen[0] for seen in rank["updates"]] == pytest.approx([seen[0] for seen in rank["plain"]], rel=1e-3)
        assert [seen[1:] for seen in rank["updates"]] == [pytest.approx(seen[1:], rel=1e-2) for seen in rank["plain"]]
        for name, tensor in rank["weights"]["plain"].items():  # some differ by one bf16 rounding
            torch.testing.assert_close(rank["weights"][job["kind"]][name], tensor, atol=1e-4, rtol=2**-7, msg=name)


@pytest.mark.parametrize("step", [0, 2])
def test_a_resumed_run_goes_on_bit_for_bit(own_gangs, trained, step):
    job, straight = trained
    resumed = own_gangs(2).run("tests.gpu_optimizer_jobs:resume", **job, step=step, count=3 - step)
    for found, wanted in zip(resumed, straight, strict=True):
        assert found["updates"] == wanted["updates"][step:]
        assert_same(found["weights"], wanted["weights"][job["kind"]])
        if step:
            assert_same(found["loaded"], wanted["saved"])


def test_another_layout_goes_on_with_it(own_gangs, trained):
    job, straight = trained
    elsewhere = {**job, "overrides": [*TP2, *(set(DISTRIBUTED) & {*job["overrides"]})]}
    resumed = own_gangs(2).run("tests.gpu_optimizer_jobs:resume", **elsewhere, step=2, count=1)
    for found, wanted in zip(resumed, straight, strict=True):
        assert_same(found["loaded"], wanted["saved"])
        (update,), expected = found["updates"], wanted["updates"][2]
        assert (update[0], update[2]) == pytest.approx((expected[0], expected[2]), rel=0.03)  # bf16 with other partial sums,
        assert update[1] == pytest.approx(expected[1], rel=0.25)  # for which a token of few may choose another expert
        # With Adam's moments lost or its step reset to 1, weights would move by the whole learning rate, 1e-3, or more.
        moved = [(found["weights"][name] - tensor).abs().sum() for name, tensor in wanted["weights"][job["kind"]].items()]
        assert sum(moved) / sum(tensor.numel() for tensor in found["weights"].values()) < 3e-4


@pytest.mark.parametrize(
    ("kind", "layout"), [("fused", "ep2"), ("fused", "pp2_first_stage_without_experts"), ("offloaded", "ep2")]
)
def test_what_leaves_the_gpu_for_rollouts_comes_back_unchanged(own_gangs, hf_models, tmp_path, kind, layout):
    family, overrides = LAYOUTS[layout]
    job = {"model": hf_models[family], "overrides": [*overrides, *DISTRIBUTED], "there": str(tmp_path), "kind": kind}
    ranks = own_gangs(2).run("tests.gpu_optimizer_jobs:train_with_rollouts_between", **job)
    for found in ranks:
        assert found["gradients"] == [0] * 6 and not found["copies"]
        assert found["moved"] == [{kind == "fused"}] * 3  # an offloaded optimizer has its state on the CPU already
        assert found["updates"] == found["plain"]
        assert_same(found["end"][kind], found["end"]["plain"])
    for resumed, straight in zip(
        own_gangs(2).run("tests.gpu_optimizer_jobs:resume", **job, step=1, count=2), ranks, strict=True
    ):
        assert_same(resumed["loaded"], straight["weights"][1])
        assert resumed["updates"] == straight["updates"][1:]
        assert_same(resumed["weights"], straight["end"][kind])
