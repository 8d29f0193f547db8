"""Jobs that ranks run on CPU for the tests of optimizers that otherwise exist only on a GPU.

"offloaded" is Megatron's own, with the weights' memory standing in for GPU memory: weights report a GPU as their device while
the optimizer decides what to keep separately, and memory is not pinned. "fused" has the structure of Transformer Engine's and
apex's Adam, with a stand-in that computes in torch. If either of these is installed, `platform.megatron_fixes` leaves out its
fixes for torch's own Adam. It does so here as well, which requires separate processes.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from etr_megatron.platform import cpu_shim, megatron_fixes

cpu_shim.install()

from megatron.core import optimizer as megatron_optimizer  # noqa: E402
from megatron.core.optimizer import HybridDeviceOptimizer, distrib_optimizer, optimizer_config  # noqa: E402

distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
optimizer_config.is_te_min_version = lambda *_args, **_kwargs: True

from etr_megatron import checkpoint  # noqa: E402
from etr_megatron.checkpoint.optimizer_shards import optimizers_of  # noqa: E402
from etr_megatron.platform.phases import PhaseBarriers  # noqa: E402
from etr_megatron.policy import Policy  # noqa: E402
from tests import policy_jobs  # noqa: E402
from tests.hf_models import random_sequences  # noqa: E402
from tests.late_writes import held_back  # noqa: E402

megatron_fixes._mend_experts()  # not needed with Transformer Engine and a GPU

BASE = ["model.dtype=bfloat16", "train.lr=1e-3", "train.lr_warmup_updates=1"]


@contextmanager
def _weights_on_a_gpu(optimizer: HybridDeviceOptimizer):
    on_gpu = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    with (
        patch.object(torch.Tensor, "is_cuda", property(lambda tensor: id(tensor) in on_gpu)),
        patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
    ):
        yield


_groups_of, _init = HybridDeviceOptimizer._get_sub_optimizer_param_groups, HybridDeviceOptimizer.__init__


def _groups(self: Any, offload_fraction: float) -> Any:
    with _weights_on_a_gpu(self):
        return _groups_of(self, offload_fraction)


def _init_unpinned(self: Any, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **{**kwargs, "pin_cpu_grads": False})


HybridDeviceOptimizer._get_sub_optimizer_param_groups = _groups
HybridDeviceOptimizer.__init__ = _init_unpinned


class FusedAdam(torch.optim.Optimizer):
    """Keeps its step in the groups, from a group's first update with parameters on, like Transformer Engine's and apex's."""

    def __init__(self, params: Any, adam_w_mode: bool, **options: Any) -> None:
        assert adam_w_mode
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2)
                size = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], size, value=-group["lr"] / (1 - beta1**step))


@contextmanager
def _fused_adam():
    with (
        patch.multiple(megatron_optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        patch.object(distrib_optimizer, "Adam", FusedAdam),
    ):
        yield


def build(model: str, overrides: list[str], kind: str) -> Policy:
    with _fused_adam() if kind == "fused" else nullcontext():
        return policy_jobs.build(model, [*BASE, *overrides], optimizer_offload=kind == "offloaded")


def updates(policy: Policy, count: int) -> list[tuple[float, float, float]]:
    batch = policy_jobs.make_batch(random_sequences())
    return [(found.loss, found.grad_norm, found.lr) for found in (policy.update(batch) for _ in range(count))]


def _weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.float().clone() for name, tensor in policy.export()}


def _numbers_apart(policy: Policy) -> int:
    """Number of weights of which this rank keeps an fp32 copy and moments, separate from the weights."""
    inner = [one.optimizer for one in optimizers_of(policy.optimizer)]
    assert all(isinstance(one, HybridDeviceOptimizer) and one.gpu_optimizer is None for one in inner)
    return sum(copy.numel() for one in inner for copy in one.gpu_params_map_cpu_copy.values())


def train_save_and_go_on(model: str, overrides: list[str], there: str, kind: str) -> dict[str, Any]:
    """Three updates with torch's Adam and with that of this `kind`; saves a checkpoint of the latter after the second."""
    plain, policy = build(model, overrides, "torch"), build(model, overrides, kind)
    checkpoint.save(Path(there), 0, policy, {}, keep=2)
    found = {"plain": updates(plain, 3), "updates": updates(policy, 2)}
    checkpoint.save(Path(there), 2, policy, {}, keep=2)
    found["saved"] = _weights(policy)
    found["updates"] += updates(policy, 1)
    found["weights"] = {"plain": _weights(plain), kind: _weights(policy)}
    if kind == "offloaded":
        found["apart"] = _numbers_apart(policy)
    return found


def resume(model: str, overrides: list[str], there: str, kind: str, step: int, count: int) -> dict[str, Any]:
    """The weights as loaded, `count` updates, and the weights after them."""
    policy = build(model, overrides, kind)
    checkpoint.load(Path(there), step, policy)
    loaded = _weights(policy)
    return {"loaded": loaded, "updates": updates(policy, count), "weights": _weights(policy)}


@contextmanager
def _leaving_a_gpu(policy: Policy):
    """Megatron takes tensors for a GPU's, and what has been copied off it is lost there: it becomes NaN, unless it is a part of
    the weights that stay."""
    staying = {weights.untyped_storage().data_ptr() for chunk in policy.chunks for weights in chunk.parameters()}
    to_cpu = torch.Tensor.cpu

    def leave(tensor: torch.Tensor) -> torch.Tensor:
        copy = to_cpu(tensor).clone()
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in staying:
            tensor.fill_(float("nan"))
        return copy

    with patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)), patch.object(torch.Tensor, "cpu", leave):
        yield


def _places_of_state(policy: Policy) -> list[int]:
    """Addresses of the fp32 weights and of the moments."""
    inner = [one.optimizer for one in optimizers_of(policy.optimizer)]
    states = [value for one in inner for state in one.state.values() for value in state.values()]
    weights = [parameter for one in inner for group in one.param_groups for parameter in group["params"]]
    return [tensor.data_ptr() for tensor in (*weights, *states) if isinstance(tensor, torch.Tensor) and tensor.numel()]


def train_with_rollouts_between(model: str, overrides: list[str], there: str, kind: str) -> dict[str, Any]:
    """Three updates without and with an offload before each. During the second offload, the latter is saved as step 1, by a
    thread that writes after the second update."""
    plain = build(model, overrides, kind)
    overrides = [*overrides, "train.offload_for_rollout=true", "sglang.placement=colocated", "checkpoint.asynchronous=true"]
    policy = build(model, overrides, kind)
    saver = checkpoint.Saver(policy.config, PhaseBarriers(60))
    buffers = [buffer for chunk in policy._ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    checkpoint.save(Path(there), 0, policy, {}, keep=2)
    found: dict[str, Any] = {"plain": [], "updates": [], "gradients": [], "moved": [], "weights": []}
    for step in range(3):
        found["plain"] += updates(plain, 1)
        places = [_places_of_state(policy)]
        for _ in range(2):  # the second time, as when servers had to be restarted for the rollout, there is nothing left to do
            with _leaving_a_gpu(policy) if kind != "offloaded" else nullcontext():
                policy.offload()
            found["gradients"].append(sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers))
            places.append(_places_of_state(policy))
        found["moved"].append({then != now for then, now in zip(*places[:2], strict=True)})
        found["weights"].append(_weights(policy))
        with held_back():
            if step == 1:
                saver.save(Path(there), 1, policy, {}, ())
            policy.reload()
            found["updates"] += updates(policy, 1)
        saver.finish()
    inner = [one.optimizer for one in optimizers_of(policy.optimizer)]
    copies = [parameter.grad for one in inner for group in one.param_groups for parameter in group["params"]]
    found["copies"] = sum(copy is not None for copy in copies) if kind == "fused" else 0
    return found | {"end": {"plain": _weights(plain), kind: _weights(policy)}}
