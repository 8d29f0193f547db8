"""What ranks read of a checkpoint: each weight once for all ranks that hold it, with the same values as before."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from etr_megatron.errors import UserError
from etr_megatron.weights.file_tensor import FileTensor
from tests.hf_models import random_sequences
from tests.policy_jobs import build, make_batch
from tests.test_policy_checkpoints import BASE

SP = "parallel.sequence_parallel=true"
LAYOUTS = {
    "dp4": ("qwen3", 4, ["parallel.tp=1"], (4, 4)),
    "tp2_dp2": ("qwen3", 4, ["parallel.tp=2"], (2, 2)),
    "cp2_dp2": ("qwen3", 4, ["parallel.tp=1", "parallel.cp=2"], (4, 4)),
    "pp2_vpp2_dp2": ("qwen3_tied", 4, ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"], (2, 2)),
    "ep2_dp4": ("qwen3_moe", 4, ["parallel.tp=1", "parallel.ep=2"], (4, 2)),
    "tp2_ep2_etp1_dp2": ("qwen3_moe", 4, ["parallel.tp=2", SP, "parallel.ep=2", "parallel.etp=1"], (2, 2)),
    "tp2_etp1": ("qwen3_moe", 2, ["parallel.tp=2", SP, "parallel.etp=1"], (1, 2)),
    "pp2_ep2_dense_first": ("qwen3_moe_dense", 4, ["parallel.tp=1", "parallel.pp=2", "parallel.ep=2"], (2, 1)),
}
"""Family, ranks, settings, and how many ranks hold the same dense weights and the same experts."""


class Counting:
    """Counts the bytes read: from HuggingFace's files, and from a torch_dist directory separately for model and optimizer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner

        self.model = self.optimizer = 0
        read_into, commit = FileTensor.read_into, MCoreLoadPlanner.commit_tensor

        def count_box(tensor: FileTensor, begin: Any, out: torch.Tensor) -> None:
            self.model += out.nbytes
            read_into(tensor, begin, out)

        def count_item(planner: Any, item: Any, values: torch.Tensor) -> None:
            if item.storage_index.fqn.startswith(("optimizer.", "chained_")):
                self.optimizer += values.nbytes
            else:
                self.model += values.nbytes
            commit(planner, item, values)

        monkeypatch.setattr(FileTensor, "read_into", count_box)
        monkeypatch.setattr(MCoreLoadPlanner, "commit_tensor", count_item)


def reading(model: str, overrides: list[str], kind: str, folder: str) -> dict[str, Any]:
    """Load weights from `model` (hf) or from a checkpoint of it in `folder` (torch_dist), or resume from that (resume)."""
    from etr_megatron import checkpoint
    from etr_megatron.policy.megatron_weights import load_weights
    from etr_megatron.policy.model import own_parameters

    policy = build(model, [*BASE, *overrides])
    step = int(kind == "resume")
    if step:
        policy.update(make_batch(random_sequences()))
    if kind != "hf":
        checkpoint.save(Path(folder), step, policy, {}, keep=1)
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(7.0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        counting = Counting(monkeypatch)
        if step:
            checkpoint.load(Path(folder), step, policy)
        else:
            load_weights([policy.chunks], model if kind == "hf" else Path(folder) / "step_000000")
    held = {False: 0, True: 0}
    for weight, parameter in own_parameters(policy.chunks).values():
        held[weight.expert is not None] += parameter.nbytes
    return {
        "same": all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True)),
        "model": counting.model,
        "optimizer": counting.optimizer,
        "held": held,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *zip(LAYOUTS, ("hf", "torch_dist") * 4, strict=True),
        ("pp2_vpp2_dp2", "hf"),
        *((layout, "resume") for layout in ("dp4", "pp2_vpp2_dp2", "ep2_dp4", "tp2_ep2_etp1_dp2")),
    ],
)
def test_weights_are_read_once_for_all_ranks_that_hold_the_same(gangs, hf_models, tmp_path, layout, kind):
    family, ranks, overrides, replicas = LAYOUTS[layout]
    job = {"function": "tests.test_policy_reads:reading", "model": hf_models[family], "overrides": overrides}
    found = gangs(ranks).run(**job, kind=kind, folder=str(tmp_path))
    assert all(rank["same"] for rank in found)
    shares = [sum(rank["held"][experts] / count for experts, count in enumerate(replicas)) for rank in found]
    assert 0 < sum(rank["model"] for rank in found) <= sum(shares), (found, shares)
    # In so small a model a tensor is a large part. When resuming, ranks that read more of the optimizer read fewer weights.
    if kind != "resume":
        assert all(rank["model"] <= 1.35 * share for rank, share in zip(found, shares, strict=True)), (found, shares)


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_optimizer_state_is_read_once_whether_it_is_sharded_or_not(gangs, hf_models, tmp_path, sharded):
    overrides = ["parallel.tp=1", f"train.distributed_optimizer={sharded}"]
    job = {"function": "tests.test_policy_reads:reading", "model": hf_models["qwen3"], "overrides": overrides}
    found = gangs(2).run(**job, kind="resume", folder=str(tmp_path))
    states = {"true": 3, "false": 2}[sharded]  # unsharded, the fp32 weights are the model's own
    assert sum(rank["optimizer"] for rank in found) == states * found[0]["held"][False]


def test_the_model_and_its_reference_are_one_reading(gangs, hf_models):
    job = {"function": "tests.test_policy_reads:built", "model": hf_models["qwen3"]}
    for rank in gangs(2).run(**job, overrides=["parallel.tp=2", "objective.kl_coef=0.1"]):
        assert rank["same"] and rank["model"] <= rank["held"]


def built(model: str, overrides: list[str]) -> dict[str, Any]:
    """What a new policy read for itself and its reference model."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        counting = Counting(monkeypatch)
        policy = build(model, overrides)
    pairs = list(zip(policy.chunks[0].parameters(), policy.reference[0].parameters(), strict=True))
    return {
        "same": all(torch.equal(*pair) for pair in pairs),
        "model": counting.model,
        "held": sum(parameter.nbytes for parameter, _ in pairs),
    }


def broken(model: str, overrides: list[str]) -> str:
    """The error on every rank when a single one cannot read its share."""
    from etr_megatron.policy.megatron_weights import load_weights

    policy = build(model, overrides)

    def fail(tensor: FileTensor, begin: Any, out: torch.Tensor) -> None:
        raise UserError(f"{tensor.file.name} ends at byte 7, in the middle of a tensor; fetch the checkpoint again")

    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 2:
            monkeypatch.setattr(FileTensor, "read_into", fail)
        with pytest.raises(UserError) as caught:
            load_weights([policy.chunks], model)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["pp2_vpp2_dp2", "ep2_dp4"])
def test_a_file_that_one_rank_cannot_read_ends_all_with_its_sentence(gangs, hf_models, layout):
    family, ranks, overrides, _ = LAYOUTS[layout]
    found = gangs(ranks).run(function="tests.test_policy_reads:broken", model=hf_models[family], overrides=overrides)
    assert found == ["model.safetensors ends at byte 7, in the middle of a tensor; fetch the checkpoint again"] * ranks


def unreadable(model: str, folder: str) -> str:
    """The error on every rank when a single one cannot read a checkpoint's file."""
    from etr_megatron import checkpoint

    policy = build(model, ["parallel.tp=1"])
    checkpoint.save(Path(folder), 0, policy, {}, keep=1)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 1:
            monkeypatch.setattr(FileSystemReader, "read_data", fail)
        with pytest.raises(UserError) as caught:
            checkpoint.load(Path(folder), 0, policy)
    return str(caught.value)


def test_a_checkpoint_that_one_rank_cannot_read_ends_all_with_one_sentence(gangs, hf_models, tmp_path):
    job = {"function": "tests.test_policy_reads:unreadable", "model": hf_models["qwen3"], "folder": str(tmp_path)}
    for message in gangs(2).run(**job):
        assert message.startswith(f"{tmp_path}/step_000000 does not fit this model ([Errno 5] Input/output error)"), message
