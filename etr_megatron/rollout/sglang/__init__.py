"""Rollouts from SGLang servers: processes, clients, weight sync. Nothing in here imports sglang: it is spoken to over HTTP."""

from etr_megatron.rollout.sglang.client import ServerError
from etr_megatron.rollout.sglang.engine import SglangEngine
from etr_megatron.rollout.sglang.fleet import FleetGoneError

__all__ = ["FleetGoneError", "ServerError", "SglangEngine"]
