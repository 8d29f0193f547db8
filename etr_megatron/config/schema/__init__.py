"""The config keys: one frozen dataclass per section, a docstring under each field. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass, field

from etr_megatron.config.schema.data import ArithmeticConfig, DataConfig, EnvironmentConfig, RewardConfig
from etr_megatron.config.schema.fp8 import Fp8Config
from etr_megatron.config.schema.lora import LoraConfig
from etr_megatron.config.schema.model import ModelConfig, ParallelConfig, TinyConfig
from etr_megatron.config.schema.objective import ObjectiveConfig
from etr_megatron.config.schema.rollout import RolloutConfig, SglangConfig
from etr_megatron.config.schema.run import CheckpointConfig, EvalConfig, ObserveConfig, RunConfig
from etr_megatron.config.schema.train import TrainConfig

__all__ = [
    "ArithmeticConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "Fp8Config",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ObserveConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SglangConfig",
    "TinyConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class Config:
    """The whole configuration; one attribute per section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    data: DataConfig = field(default_factory=DataConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sglang: SglangConfig = field(default_factory=SglangConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
