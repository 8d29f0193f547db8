"""Rollouts from SGLang servers: processes, clients, weight sync. Nothing here imports sglang; all calls go over HTTP."""

from etr_megatron.rollout.sglang.client import ServerError
from etr_megatron.rollout.sglang.engine import Serving, SglangEngine
from etr_megatron.rollout.sglang.server_nodes import ServerNode, ServerNodes

__all__ = ["ServerError", "ServerNode", "ServerNodes", "Serving", "SglangEngine"]
