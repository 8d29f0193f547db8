"""A process of the environment: `python -m etr_megatron.environment.worker PARENT_PID CONFIG_JSON`, started only by the pool.

A request has the fields of `EnvironmentRequest`; a reply has `messages`, `status` and `detail`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from etr_megatron.config import EnvironmentConfig
from etr_megatron.environment.functions import load_environment
from etr_megatron.environment.reply import EnvironmentRequest
from etr_megatron.platform.worker_main import Answer, serve


def load(values: dict[str, Any]) -> Answer:
    """What answers a request under this config."""
    environment = load_environment(EnvironmentConfig(**values))
    return lambda request: asdict(environment(EnvironmentRequest(**request)))


if __name__ == "__main__":
    sys.exit(serve(load))
