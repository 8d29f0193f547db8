"""Configuration: a typed schema, YAML plus `section.key=value` overrides, and constraints. Importable without torch.

config = load_config("configs/cpu_tiny.yaml", ["train.lr=1e-5"])    # UserError lists everything that is wrong
config = resolve(config, world_size=2, cuda=False)                  # no `auto` left
print(dump_yaml(config))
"""

from __future__ import annotations

from etr_megatron.config.defaults import (
    EVALUATED,
    fill_objective,
    request_timeout_of,
    resolved,
    response_limits,
    startup_timeout_of,
    sync_of,
    tensor_parallel,
)
from etr_megatron.config.dump import dump_yaml, to_dict
from etr_megatron.config.invalid import InvalidConfigError
from etr_megatron.config.load import load_config
from etr_megatron.config.presets import LOSSES, PRESETS
from etr_megatron.config.resolve import resolve
from etr_megatron.config.run_paths import path_of_run
from etr_megatron.config.schema import (
    ArithmeticConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EnvironmentConfig,
    EvalConfig,
    Fp8Config,
    ModelConfig,
    ObjectiveConfig,
    ObserveConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SglangConfig,
    TinyConfig,
    TrainConfig,
)
from etr_megatron.config.sources import ARITHMETIC, Source, samples_of_set, sets_by_name, sources_of
from etr_megatron.config.validate import config_warnings, validate

__all__ = [
    "ARITHMETIC",
    "EVALUATED",
    "LOSSES",
    "PRESETS",
    "ArithmeticConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "Fp8Config",
    "InvalidConfigError",
    "ModelConfig",
    "ObjectiveConfig",
    "ObserveConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SglangConfig",
    "Source",
    "TinyConfig",
    "TrainConfig",
    "config_warnings",
    "dump_yaml",
    "fill_objective",
    "load_config",
    "path_of_run",
    "request_timeout_of",
    "resolve",
    "resolved",
    "response_limits",
    "samples_of_set",
    "sets_by_name",
    "sources_of",
    "startup_timeout_of",
    "sync_of",
    "tensor_parallel",
    "to_dict",
    "validate",
]
