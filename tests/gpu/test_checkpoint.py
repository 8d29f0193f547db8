"""Checkpoints of GPU-only optimizers: Transformer Engine's fused Adam, and Adam in CPU memory."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_policy import make_batch
from tests.gpu.conftest import DRY_RUN
from tests.gpu.policies import build, sequences, write_model

KINDS = {
    "plain": [],
    "distributed": ["train.distributed_optimizer=true"],
    "overlapped": [
        *("train.distributed_optimizer=true", "train.overlap_grad_reduce=true", "train.overlap_param_gather=true"),
    ],
    "offloaded": ["train.distributed_optimizer=true", "train.optimizer_offload=true"],
}


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_policy_goes_on_like_the_one_that_was_saved(world, device, tmp_path, kind, step):
    if kind == "offloaded" and DRY_RUN:
        pytest.skip("there is no GPU memory to offload from")
    if DRY_RUN and (kind, step) not in (("plain", 0), ("overlapped", 1)):
        pytest.skip("on CPU two cases show that the test works; tests/test_policy_checkpoints.py has the others")
    model, pairs = write_model(tmp_path / "model"), sequences()
    policy = build(model, "train.lr=1e-3", *KINDS[kind])
    from etr_megatron import checkpoint  # after the policy, whose import prepares Megatron

    batch = make_batch(pairs, policy.logprobs(pairs).logp)
    for _ in range(step):
        policy.update(batch)
    checkpoint.save(tmp_path / "run", step, policy, {}, keep=1)
    wanted = [policy.update(batch) for _ in range(2)]
    resumed = build(model, "train.lr=1e-3", *KINDS[kind])
    checkpoint.load(tmp_path / "run", step, resumed)
    found = [resumed.update(batch) for _ in range(2)]
    assert [one.lr for one in found] == [one.lr for one in wanted]
    assert [one.loss for one in found] == pytest.approx([one.loss for one in wanted], abs=1e-3)
    assert [one.grad_norm for one in found] == pytest.approx([one.grad_norm for one in wanted], rel=0.02)
    straight = {name: tensor.clone() for name, tensor in policy.export()}
    # Adam moves most weights by the learning rate per step, so an uncounted step or lost moments would show.
    for name, tensor in resumed.export():
        difference = (tensor.float() - straight[name].float()).abs().mean()
        assert difference < 2e-4, f"{name}: {difference:.1e}"
        assert torch.isfinite(tensor).all()
