"""Environments: a user's function that answers the model between its turns, called in killable worker processes.

with EnvironmentPool(config.environment) as pool:
    pool.submit(7, EnvironmentRequest(messages, answer, columns, response_id))
    for key, reply in pool.poll(timeout_s=1.0): ...
"""

from __future__ import annotations

from etr_megatron.environment.functions import load_environment
from etr_megatron.environment.pool import EnvironmentPool
from etr_megatron.environment.reply import EnvironmentReply, EnvironmentRequest

__all__ = ["EnvironmentPool", "EnvironmentReply", "EnvironmentRequest", "load_environment"]
