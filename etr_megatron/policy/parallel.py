"""Process groups of the policy: one torch.distributed world, cut by Megatron into TP x PP x DP, for experts into ETP x EP."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from etr_megatron import platform
from etr_megatron.weights import TrainingLayout, Weight


@dataclass(frozen=True)
class Layout:
    """This rank's place. `stage` counts pipeline stages; sizes are of the groups.

    ep, etp: expert-parallel and expert-tensor-parallel groups, which cut the TP x DP ranks of a stage anew for experts.
    """

    rank: int
    world: int
    tp: int
    tp_rank: int
    pp: int
    stage: int
    dp: int
    dp_rank: int
    ep: int
    ep_rank: int
    etp: int
    etp_rank: int

    @property
    def training(self) -> TrainingLayout:
        """The layout of all ranks, for the weight map."""
        return TrainingLayout(tp=self.tp, pp=self.pp, dp=self.dp, ep=self.ep, etp=self.etp)

    def cut(self, weight: Weight) -> tuple[int, int]:
        """(ranks that a weight is cut over, this rank's number among them): expert-tensor-parallel ones for an expert's."""
        return (self.tp, self.tp_rank) if weight.expert is None else (self.etp, self.etp_rank)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the LM head and computes the loss."""
        return self.stage == self.pp - 1

    @property
    def is_reporter(self) -> bool:
        """One rank per data-parallel replica that holds losses: last stage, first tensor-parallel rank."""
        return self.is_last_stage and self.tp_rank == 0


def init_world(timeout_s: float) -> None:
    """Join the world that torchrun describes in the environment; `timeout_s` is the deadline of every collective."""
    if platform.uses_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group(platform.backend(), timeout=datetime.timedelta(seconds=timeout_s))


def init_layout(tp: int, pp: int, seed: int, timeout_s: float = 1800.0, *, ep: int = 1, etp: int | None = None) -> Layout:
    """Cut the world into model-parallel groups and seed the ranks. The groups of another, earlier layout are destroyed.

    etp: tensor parallelism of an expert, None is `tp`. Raises RuntimeError (from Megatron) when TP x PP or ETP x EP x PP does
    not divide the world.
    """
    sizes = (tp, pp, ep, tp if etp is None else etp)
    if _sizes() != sizes:
        _destroy_layout()
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=sizes[3],
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Layout(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp=tp,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp=pp,
        stage=mpu.get_pipeline_model_parallel_rank(),
        dp=mpu.get_data_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        ep=ep,
        ep_rank=mpu.get_expert_model_parallel_rank(),
        etp=sizes[3],
        etp_rank=mpu.get_expert_tensor_parallel_rank(),
    )


def _sizes() -> tuple[int, int, int, int] | None:
    """TP, PP, EP and ETP of the groups that there are, None when there are none."""
    if not mpu.model_parallel_is_initialized():
        return None
    return (
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_expert_model_parallel_world_size(),
        mpu.get_expert_tensor_parallel_world_size(),
    )


def _destroy_layout() -> None:
    """Megatron's own clean-up only forgets its groups; a forgotten gloo group keeps three threads, one of them polling."""
    if not mpu.model_parallel_is_initialized():
        return  # some of Megatron's names still hold groups of the layout before, destroyed already
    values = [value if isinstance(value, list) else [value] for value in vars(mpu).values()]
    groups = {group for some in values for group in some if isinstance(group, dist.ProcessGroup)} - {dist.group.WORLD}
    for group in groups:
        dist.destroy_process_group(group)
    mpu.destroy_model_parallel()
