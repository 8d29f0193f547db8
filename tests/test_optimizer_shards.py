"""The distributed optimizer's state in checkpoints: boxes of ranges, which rank writes what, and Megatron's own format."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from etr_megatron.checkpoint.optimizer_shards import boxes_of_range, optimizers_of
from tests.hf_models import random_sequences
from tests.policy_jobs import build, make_batch
from tests.test_policy_checkpoints import BASE, check, update_twice

SHARDED = "train.distributed_optimizer=true"
OVERLAP = ["train.overlap_grad_reduce=true", "train.overlap_param_gather=true"]


@st.composite
def ranges(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    begin, end = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, begin, end


@given(ranges())
def test_boxes_of_a_range_are_its_elements_in_order(problem):
    shape, begin, end = problem
    whole = np.arange(math.prod(shape)).reshape(shape)
    boxes = list(boxes_of_range(shape, begin, end))
    found = [whole[tuple(map(slice, offsets, np.add(offsets, sizes)))].reshape(-1) for offsets, sizes in boxes]
    assert np.concatenate([[], *found]).tolist() == list(range(begin, end))
    assert all(math.prod(sizes) > 0 for _, sizes in boxes)
    assert len(boxes) <= 2 * len(shape) - 1


def save_once(model: str, overrides: list[str], folder: str) -> int:
    """A checkpoint after one update; returns the elements of the optimizer's state that this rank holds."""
    from etr_megatron import checkpoint

    policy = build(model, [*BASE, *overrides])
    policy.update(make_batch(random_sequences()))
    checkpoint.save(Path(folder), 1, policy, {}, keep=1)
    return sum(state["exp_avg"].numel() for one in optimizers_of(policy.optimizer) for state in one.optimizer.state.values())


def written(folder: Path) -> dict[str, Counter[int]]:
    """Elements that every rank wrote, of Adam's first moments and of the model."""
    metadata = pickle.loads((folder / "step_000001" / ".metadata").read_bytes())
    sizes = {
        (name, tuple(chunk.offsets)): math.prod(chunk.sizes)
        for name, tensor in metadata.state_dict_metadata.items()
        for chunk in getattr(tensor, "chunks", [])
    }
    found = {"exp_avg": Counter(), "model": Counter()}
    for index, place in metadata.storage_data.items():
        rank = int(place.relative_path.split("_")[2])
        elements = sizes.get((index.fqn, tuple(index.offset or ())), 0)  # none for objects, which are not tensors
        if "optimizer.state.exp_avg." in index.fqn:
            found["exp_avg"][rank] += elements
        elif "optimizer.state." not in index.fqn:
            found["model"][rank] += elements
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ranks", "layout"),
    [("qwen3", 3, ["parallel.tp=1"]), ("qwen3", 4, ["parallel.tp=2"]), ("qwen3_moe", 4, ["parallel.tp=1", "parallel.ep=2"])],
    ids=["dp3", "tp2_dp2", "ep2_dp4"],
)
def test_every_data_parallel_rank_writes_what_it_holds(gangs, hf_models, tmp_path, family, ranks, layout):
    job = {"function": "tests.test_optimizer_shards:save_once", "model": hf_models[family], "folder": str(tmp_path)}
    held = gangs(ranks).run(**job, overrides=[*layout, SHARDED])
    found = written(tmp_path)
    # Parameters on several tensor-parallel ranks (norms) are written by one of them.
    assert all(0.9 * held[rank] <= found["exp_avg"][rank] <= held[rank] for rank in range(ranks)), (held, found)
    if "parallel.tp=1" in layout:
        assert sum(found["exp_avg"].values()) == sum(found["model"].values())
    mean = sum(found["model"].values()) / ranks
    assert all(0.5 * mean < found["model"][rank] < 1.5 * mean for rank in range(ranks)), found["model"]


def in_megatrons_form(model: str, overrides: list[str], save: str | None = None, load: str | None = None) -> dict[str, Any]:
    """`update_twice` with checkpoints in Megatron's own format."""
    from etr_megatron.checkpoint import checkpoint

    ours, checkpoint.store_by_rank = checkpoint.store_by_rank, lambda optimizer: None
    try:
        return update_twice(model, overrides, save, load)
    finally:
        checkpoint.store_by_rank = ours
        dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ours"), [("qwen3_tied", "saves"), ("qwen3_moe", "loads")])
def test_megatrons_form_and_ours_are_read_as_each_other(gangs, hf_models, tmp_path, family, ours):
    functions = {"saves": ("update_twice", "in_megatrons_form"), "loads": ("in_megatrons_form", "update_twice")}[ours]
    before, after = (f"tests.test_optimizer_shards:{name}" for name in functions)
    layout = (2, ["parallel.tp=1", SHARDED])
    check(gangs, hf_models[family], tmp_path, layout, (3, layout[1]), functions=(before, after))


@pytest.mark.parametrize("grads", ["float32", "bfloat16"])
def test_a_bf16_model_goes_on_from_its_fp32_weights(gangs, hf_models, tmp_path, grads):
    bf16 = ["model.dtype=bfloat16", f"train.grads_dtype={grads}", *OVERLAP, SHARDED]
    layout = (3, ["parallel.tp=1", *bf16])
    check(gangs, hf_models["qwen3"], tmp_path, layout, layout)


def five_updates(model: str, overrides: list[str], folder: str, begin: int) -> dict[str, Any]:
    """The updates of a run of five after `begin`, and its weights at the end. begin: 0, where it saves after the second, or 2,
    where it begins with that checkpoint."""
    from etr_megatron import checkpoint

    policy, found = build(model, [*BASE, *overrides]), []
    if begin:
        checkpoint.load(Path(folder), begin, policy)
    for step in range(begin + 1, 6):
        update = policy.update(make_batch(random_sequences(), seed=step))
        found.append((update.loss, update.grad_norm, update.lr))
        if step == 2:
            checkpoint.save(Path(folder), 2, policy, {}, keep=1)
            dist.barrier()
    return {"updates": found, "weights": {name: tensor.clone() for name, tensor in policy.export()}}


def test_a_resume_goes_on_bit_for_bit(gangs, hf_models, tmp_path):
    """The second and third updates after the resume are the ones where a shared Adam step count would show."""
    job = {"function": f"{__name__}:five_updates", "model": hf_models["qwen3"], "folder": str(tmp_path)}
    straight, resumed = (gangs(2).run(**job, overrides=["parallel.tp=1", SHARDED], begin=begin) for begin in (0, 2))
    for wanted, found in zip(straight, resumed, strict=True):
        assert len(set(wanted["updates"])) == 5 and found["updates"] == wanted["updates"][2:]
        assert all(torch.equal(found["weights"][name], tensor) for name, tensor in wanted["weights"].items())
