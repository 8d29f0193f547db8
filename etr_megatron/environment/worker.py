"""A process of the environment: `python -m etr_megatron.environment.worker PARENT_PID CONFIG_JSON`, started only by the pool.

A request has the fields of `EnvironmentRequest`; a reply has `messages`, `status` and `detail`.
"""

from __future__ import annotations

import sys
from typing import Any

from etr_megatron.config import EnvironmentConfig
from etr_megatron.environment.functions import AsyncEnvironment, Environment, load_environment
from etr_megatron.environment.reply import EnvironmentRequest
from etr_megatron.platform.worker_main import serve


def load(values: dict[str, Any]) -> Environment | AsyncEnvironment:
    """The function that answers a request under this config."""
    return load_environment(EnvironmentConfig(**values))


if __name__ == "__main__":
    sys.exit(serve(load, EnvironmentRequest))
