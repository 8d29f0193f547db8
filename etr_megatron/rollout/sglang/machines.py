"""Creates the `Machine` of a node: a node that trains, or a node for servers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from etr_megatron.config import SglangConfig, startup_timeout_of
from etr_megatron.platform.job_store import own_connection
from etr_megatron.rollout.sglang.commands import server_command
from etr_megatron.rollout.sglang.hosts import Host, Machine
from etr_megatron.rollout.sglang.parts import SpanningServers


class ServerSetting(NamedTuple):
    """Settings of the servers that are not in the config. folder: for the servers' files, visible to all nodes. routing:
    whether servers must return the chosen experts. tokenizer: whether they need a tokenizer."""

    model_dir: str
    dtype: str
    folder: str
    api_key: str | None
    cuda: bool
    routing: bool = False
    tokenizer: bool = False


def machine_of(
    config: SglangConfig, names: Sequence[str], part: int, address: str, setting: ServerSetting, store: dist.Store
) -> Machine:
    """The servers of this machine; if servers span nodes, this machine's part of them, which has number `part`.

    store: of the job. Raises UserError when the machine has too few GPUs for the servers.
    """
    folder = Path(setting.folder)
    commands = {
        name: server_command(
            config,
            Path(setting.model_dir),
            setting.dtype,
            place=place,
            host=address,
            folder=folder,
            api_key=setting.api_key,
            cuda=setting.cuda,
            routing=setting.routing,
            tokenizer=setting.tokenizer,
            part=part,
        )
        for place, name in enumerate(names)
    }
    timeout_s = startup_timeout_of(config)
    if config.nodes_per_server > 1:
        return SpanningServers(commands, folder, timeout_s, own_connection(store))
    return Host(commands, folder, timeout_s)
