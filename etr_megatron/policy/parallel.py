"""Process groups of the policy: Megatron splits one world into TP x CP x DP x PP, and into ETP x EP for experts."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from etr_megatron import platform
from etr_megatron.config import Config
from etr_megatron.weights import TrainingLayout, Weight


@dataclass(frozen=True)
class Layout:
    """This rank's place in the parallel layout: group sizes and ranks; `stage` is its pipeline rank.

    dp: replicas that train on different samples. ep, etp: expert-parallel and expert-tensor-parallel groups, a second split of
    a stage's TP x CP x DP ranks. cp: ranks that share the tokens of a sequence. vpp: model chunks per stage.
    first_stage_layers, last_stage_layers: layers of those stages; None is an even share.
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
    cp: int = 1
    cp_rank: int = 0
    vpp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @property
    def training(self) -> TrainingLayout:
        """The layout of all ranks, for the weight map."""
        return TrainingLayout(
            tp=self.tp,
            pp=self.pp,
            dp=self.dp * self.cp,
            ep=self.ep,
            etp=self.etp,
            vpp=self.vpp,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    def cut(self, weight: Weight) -> tuple[int, int]:
        """(number of ranks that shard a weight, this rank's index): expert-tensor-parallel ranks for an expert's weight."""
        return (self.tp, self.tp_rank) if weight.expert is None else (self.etp, self.etp_rank)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the LM head and computes the loss."""
        return self.stage == self.pp - 1

    @property
    def is_reporter(self) -> bool:
        """Whether this rank reports losses, which are the same on its tensor-parallel ranks: rank 0 of them, in the last
        stage."""
        return self.is_last_stage and self.tp_rank == 0


def init_world(timeout_s: float) -> None:
    """Join the world that torchrun describes in the environment; `timeout_s` is the deadline of its collectives."""
    if platform.uses_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group(platform.backend(), timeout=datetime.timedelta(seconds=timeout_s))


def init_layout(
    tp: int,
    pp: int,
    seed: int,
    timeout_s: float = 1800.0,
    *,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
    vpp: int = 1,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
) -> Layout:
    """Split the world into model-parallel groups and seed the ranks. Destroys the groups of an earlier, different layout.

    timeout_s: deadline of the groups' collectives, which Megatron takes in minutes: rounded, at least one. etp: tensor
    parallelism of an expert; None is `tp`. Raises RuntimeError (from Megatron) if TP x CP x PP or ETP x EP x PP does not
    divide the world size.
    """
    sizes = (tp, pp, ep, tp if etp is None else etp, cp, vpp)
    if _sizes() != sizes:
        _destroy_layout()
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=sizes[3],
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
            create_gloo_process_groups=False,  # only Megatron's own writer of optimizer states would use them
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
        cp=cp,
        cp_rank=mpu.get_context_parallel_rank(),
        vpp=vpp,
        first_stage_layers=first_stage_layers,
        last_stage_layers=last_stage_layers,
    )


def configured_layout(config: Config) -> Layout:
    """`init_layout` with `parallel`, `run.seed` and `run.phase_timeout_s` of a resolved config."""
    parallel = config.parallel
    assert parallel.tp != "auto"  # it is resolved
    return init_layout(
        parallel.tp,
        parallel.pp,
        config.run.seed,
        config.run.phase_timeout_s,
        ep=parallel.ep,
        etp=parallel.etp,
        cp=parallel.cp,
        vpp=parallel.vpp,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )


def _sizes() -> tuple[int, ...] | None:
    """TP, PP, EP, ETP, CP and VPP of the existing groups, or None without groups."""
    if not mpu.model_parallel_is_initialized():
        return None
    return (
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_expert_model_parallel_world_size(),
        mpu.get_expert_tensor_parallel_world_size(),
        mpu.get_context_parallel_world_size(),
        mpu.get_virtual_pipeline_model_parallel_world_size() or 1,
    )


def _destroy_layout() -> None:
    """Destroy all groups. Megatron's own cleanup only drops its references, and a dropped gloo group keeps three threads, one
    of them polling."""
    if not mpu.model_parallel_is_initialized():
        return  # some of Megatron's globals still refer to groups that are already destroyed
    values = [value if isinstance(value, list) else [value] for value in vars(mpu).values()]
    groups = {group for some in values for group in some if isinstance(group, dist.ProcessGroup)} - {dist.group.WORLD}
    for group in groups:
        dist.destroy_process_group(group)
    mpu.destroy_model_parallel()
