"""Checkpoints of the policy continued in another layout: experts, buckets of the distributed optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from etr_megatron.errors import UserError
from tests.hf_models import random_sequences
from tests.policy_jobs import build, make_batch

BASE = ["train.lr=0.1", "train.adam_eps=1e-3", "train.clip_grad=0.5"]


def update_twice(model: str, overrides: list[str], save: str | None = None, load: str | None = None) -> dict[str, Any]:
    """Two updates, or, with `load`, only the second, from the checkpoint that a run with `save` wrote after its first."""
    from etr_megatron import checkpoint

    policy = build(model, [*BASE, *overrides])
    batch = make_batch(random_sequences())
    if load:
        checkpoint.load(Path(load), 1, policy)
    else:
        policy.update(batch)
    if save:
        checkpoint.save(Path(save), 1, policy, {}, keep=1)
        dist.barrier()
    last = policy.update(batch)
    weights = {name: tensor.clone() for name, tensor in policy.export()}
    return {"loss": last.loss, "grad_norm": last.grad_norm, "lr": last.lr, "weights": weights}


SP = "parallel.sequence_parallel=true"
CHANGES = {
    "ep2_to_one_rank": ((2, ["parallel.tp=1", "parallel.ep=2"]), (1, ["parallel.tp=1"])),
    "one_rank_to_ep2": ((1, ["parallel.tp=1"]), (2, ["parallel.tp=1", "parallel.ep=2"])),
    "ep2_to_tp2_ep2_etp1": (
        (2, ["parallel.tp=1", "parallel.ep=2"]),
        (2, ["parallel.tp=2", SP, "parallel.ep=2", "parallel.etp=1"]),
    ),
    "frozen_routers": (
        (2, ["parallel.tp=1", "parallel.pp=2", "train.moe_freeze_router=true"]),
        (2, ["parallel.tp=1", "parallel.ep=2", "train.moe_freeze_router=true"]),
    ),
    "tp2_to_pp2": ((2, ["parallel.tp=2", SP]), (2, ["parallel.tp=1", "parallel.pp=2"])),
    "pp2_vpp2_to_ep2": ((2, ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"]), (2, ["parallel.tp=1", "parallel.ep=2"])),
    "cp2_to_pp2_vpp2": ((2, ["parallel.tp=1", "parallel.cp=2"]), (2, ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"])),
    "pp2_to_uneven_pp2": (
        (2, ["parallel.tp=1", "parallel.pp=2"]),
        (2, ["parallel.tp=1", "parallel.pp=2", "parallel.last_stage_layers=1"]),
    ),
    # The first stage of qwen3_moe_dense has no experts.
    "pp2_to_ep2": ((2, ["parallel.tp=1", "parallel.pp=2"]), (2, ["parallel.tp=1", "parallel.ep=2"])),
}


UPDATE_TWICE = "tests.test_policy_checkpoints:update_twice"


def check(
    gangs,
    model: str,
    tmp_path,
    before: tuple[int, list[str]],
    after: tuple[int, list[str]],
    functions: tuple[str, str] = (UPDATE_TWICE, UPDATE_TWICE),
) -> None:
    wanted = gangs(before[0]).run(function=functions[0], model=model, overrides=before[1], save=str(tmp_path))[0]
    for found in gangs(after[0]).run(function=functions[1], model=model, overrides=after[1], load=str(tmp_path)):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
        assert found["lr"] == wanted["lr"]
        for name, tensor in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "change", "sharded"),
    [
        *(("qwen3_moe", change, True) for change in ("one_rank_to_ep2", "frozen_routers", "tp2_to_pp2", "cp2_to_pp2_vpp2")),
        *(("qwen3_moe", change, False) for change in ("ep2_to_one_rank", "ep2_to_tp2_ep2_etp1", "tp2_to_pp2")),
        # Layers without experts make a difference where layers move between stages.
        *(("qwen3_moe_dense", change, True) for change in ("pp2_to_uneven_pp2", "pp2_to_ep2")),
        ("qwen3_moe_dense", "pp2_to_ep2", False),
        ("glm4_moe", "pp2_vpp2_to_ep2", True),
        ("deepseek_v3", "ep2_to_tp2_ep2_etp1", True),
    ],
)
def test_a_checkpoint_continues_in_another_layout_of_experts(gangs, hf_models, tmp_path, family, change, sharded):
    before, after = ((world, [*layout, f"train.distributed_optimizer={sharded}"]) for world, layout in CHANGES[change])
    check(gangs, hf_models[family], tmp_path, before, after)


def test_padding_of_buckets_does_not_shift_what_a_checkpoint_holds(gangs, hf_models, tmp_path):
    # A tied embedding has a bucket of its own. With one layer of this width per stage, the bucket before it is padded.
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(hf_models["qwen3_tied"], intermediate_size=84)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    layout = (4, ["parallel.tp=1", "parallel.pp=4", "train.distributed_optimizer=true"])
    check(gangs, str(tmp_path / "model"), tmp_path / "run", layout, layout)


def learning_rates(model: str, steps: int, updates: int, save: str | None = None, load: str | None = None) -> list[float]:
    """The learning rate of each update, in a run planned for `steps` steps, from the start or from the checkpoint of step 3."""
    from etr_megatron import checkpoint

    policy = build(model, [f"run.steps={steps}", "train.minibatches=1", "train.lr_decay=linear", "train.lr_warmup_updates=1"])
    if load:
        checkpoint.load(Path(load), 3, policy)
    batch = make_batch(random_sequences())
    found = [policy.update(batch).lr for _ in range(updates)]
    if save:
        checkpoint.save(Path(save), 3, policy, {}, keep=1)
    return found


def test_more_steps_than_planned_stretch_the_learning_rate_decay(gangs, hf_models, tmp_path):
    job = {"function": "tests.test_policy_checkpoints:learning_rates", "model": hf_models["qwen3"]}
    long = gangs(1).run(**job, steps=6, updates=6)[0]
    short = gangs(1).run(**job, steps=3, updates=3, save=str(tmp_path))[0]
    stretched = gangs(1).run(**job, steps=6, updates=3, load=str(tmp_path))[0]
    assert stretched == pytest.approx(long[3:]) and long[4] > 0
    assert short[2] < long[2]  # the shorter plan was closer to its end


def after_step_0(model: str, overrides: list[str], folder: str | None = None) -> dict[str, Any]:
    """Two updates of a new policy, or, with `folder`, of one that has loaded its checkpoint of step 0."""
    from etr_megatron import checkpoint

    policy = build(model, [*BASE, *overrides])
    if folder:
        checkpoint.save(Path(folder), 0, policy, {}, keep=1)
        policy = build(model, [*BASE, *overrides])
        checkpoint.load(Path(folder), 0, policy)
    batch = make_batch(random_sequences())
    updates = [policy.update(batch) for _ in range(2)]
    return {
        "metrics": [(update.loss, update.grad_norm, update.lr) for update in updates],
        "weights": {name: tensor.clone() for name, tensor in policy.export()},
    }


@pytest.mark.parametrize("sharded", ["false", "true"], ids=["plain", "distributed_optimizer"])
def test_a_run_that_stopped_before_its_first_update_goes_on(gangs, hf_models, tmp_path, sharded):
    # As after SIGTERM during the first step's rollouts: Adam has no state yet.
    overrides = ["parallel.tp=1", f"train.distributed_optimizer={sharded}"]
    job = {"function": "tests.test_policy_checkpoints:after_step_0", "model": hf_models["qwen3"], "overrides": overrides}
    wanted = gangs(2).run(**job)
    for found, straight in zip(gangs(2).run(**job, folder=str(tmp_path)), wanted, strict=True):
        assert found["metrics"] == straight["metrics"]
        for name, tensor in straight["weights"].items():
            assert torch.equal(found["weights"][name], tensor), name


def refusal(model: str, other: str, folder: str) -> str:
    """The error when a checkpoint of `model` is loaded into a policy of `other`."""
    from etr_megatron import checkpoint

    checkpoint.save(Path(folder), 1, build(model, ["parallel.tp=1"]), {}, keep=1)
    with pytest.raises(UserError) as caught:
        checkpoint.load(Path(folder), 1, build(other, ["parallel.tp=1"]))
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_refused_with_the_first_tensor_that_it_lacks(gangs, hf_models, tmp_path):
    job = {"function": "tests.test_policy_checkpoints:refusal", "model": hf_models["qwen3"], "other": hf_models["qwen2"]}
    for message in gangs(2).run(**job, folder=str(tmp_path)):
        lacks = "does not fit this model (decoder.layers.self_attention.linear_qkv.bias from model not in state dict);"
        assert message.startswith(f"{tmp_path}/step_000001 {lacks}")
        assert "restore the settings it was made with" in message and len(message) < 400


def other_optimizer(model: str, before: str, folder: str) -> str:
    """The error when a checkpoint of a run with `train.distributed_optimizer=before` is loaded with the other value."""
    from etr_megatron import checkpoint

    after = {"true": "false", "false": "true"}[before]
    policies = [build(model, ["parallel.tp=1", f"train.distributed_optimizer={value}"]) for value in (before, after)]
    policies[0].update(make_batch(random_sequences()))
    checkpoint.save(Path(folder), 1, policies[0], {}, keep=1)
    with pytest.raises(UserError) as caught:
        checkpoint.load(Path(folder), 1, policies[1])
    return str(caught.value)


@pytest.mark.parametrize("before", ["true", "false"])
def test_a_checkpoint_of_the_other_optimizer_is_refused_with_the_key_to_set(gangs, hf_models, tmp_path, before):
    job = {"function": "tests.test_policy_checkpoints:other_optimizer", "model": hf_models["qwen3"], "before": before}
    (message,) = gangs(1).run(**job, folder=str(tmp_path))
    assert message == (
        f"{tmp_path}/step_000001 was written with train.distributed_optimizer={before}, whose state the other optimizer cannot "
        "read; set that again, or choose another run.name"
    )


def error_of_a_damaged_checkpoint(model: str, folder: str, file: str, content: bytes | None) -> str:
    """The error of a load after `file` of the checkpoint was truncated, or replaced by `content`."""
    from etr_megatron import checkpoint

    policy = build(model, ["parallel.tp=1"])
    checkpoint.save(Path(folder), 0, policy, {"step": 0, "tensors": {"drawn": torch.ones(2)}}, keep=1)
    (path,) = Path(folder).glob(f"step_*/{file}")
    path.write_bytes(path.read_bytes()[:10] if content is None else content)
    with pytest.raises(UserError) as error:
        checkpoint.load(Path(folder), 0, policy)
    return str(error.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *((name, None) for name in ("trainer.json", "trainer.safetensors", "metadata.json", "common.pt", "__0_0.distcp")),
        ("trainer.json", b"[]"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_said_to_be_removed(gangs, hf_models, tmp_path, file, content):
    job = dict(model=hf_models["qwen3"], folder=str(tmp_path), file=file, content=content)
    (error,) = gangs(1).run("tests.test_policy_checkpoints:error_of_a_damaged_checkpoint", **job)
    assert (
        error.startswith(f"{tmp_path / 'step_000000'} ") and "damaged" in error and "remove it" in error and "()" not in error
    )
