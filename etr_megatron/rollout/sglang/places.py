"""Where the servers of a job run: which ranks start servers, and at which addresses."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

import torch.distributed as dist

from etr_megatron.config import SglangConfig


def addresses_of(config: SglangConfig) -> dict[int, str]:
    """Rank -> address of its servers, for the ranks that start servers. A collective."""
    if config.urls or config.dedicated_nodes:
        return {}
    if config.nodes == "first":
        return {0: "127.0.0.1"}
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    own = address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1")) if first else None
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    hosts = {rank: address for rank, address in enumerate(found) if address is not None}
    # Rank 0's route to itself is loopback, which other nodes cannot reach.
    if 0 in hosts and len(hosts) > 1 and not all(map(is_loopback, hosts.values())):
        hosts[0] = _reachable(hosts[0], next(one for one in hosts.values() if not is_loopback(one)))
    return hosts


def parts_of(names: Sequence[str], nodes: int, config: SglangConfig) -> list[tuple[list[str], int]]:
    """For each node that runs servers: the names of its servers, and the number of its part if they span nodes, else 0."""
    span, each = config.nodes_per_server, config.servers
    return [(list(names[node // span * each : (node // span + 1) * each]), node % span) for node in range(nodes)]


def _reachable(own: str, other: str) -> str:
    """An address of rank 0's machine that another node can reach."""
    return address_towards(other) if is_loopback(own) else own


def own_address_of(config: SglangConfig, addresses: dict[int, str]) -> str:
    """The address at which servers and ranks of other nodes reach rank 0. Call it on rank 0. addresses: see `addresses_of`."""
    if config.host is not None:
        return config.host
    if away := hosts_away(config.urls):
        return address_towards(away[0])
    has_nodes = len(addresses) > 1 or int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    return os.environ["MASTER_ADDR"] if has_nodes else "127.0.0.1"


def hosts_away(urls: Iterable[str]) -> list[str]:
    """Hosts of these URLs that are not this machine's loopback interface."""
    return [host for host in (urlsplit(url).hostname or "" for url in urls) if not is_loopback(host)]


def new_key(addresses: Iterable[str]) -> str | None:
    """A new API key; None if only this machine can reach the servers.

    The key is hexadecimal, because SGLang appends the contents of its config file to its command line. A key that starts with a
    dash, as 1 in 64 base64 keys does, would be taken for an option.
    """
    return None if all(map(is_loopback, addresses)) else secrets.token_hex(32)


def address_towards(host: str) -> str:
    """This machine's source address for packets to `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # nothing is sent
        return str(probe.getsockname()[0])


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own loopback interface."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False
