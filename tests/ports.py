"""Ports that are a test's own from the moment it knows them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch.distributed as dist


@contextmanager
def reserved_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A port that no other process is given while the block runs, and on which a server can listen all the same: it is bound
    here, without listening, and both sides allow its reuse, as torch's stores and Python's HTTP servers do."""
    with socket.socket() as holding:
        holding.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holding.bind((address, 0))
        yield int(holding.getsockname()[1])


@contextmanager
def rank_0s_port() -> Iterator[int]:
    """A port reserved by rank 0 for its store, on every rank. A collective."""
    with reserved_port() if dist.get_rank() == 0 else nullcontext(0) as own:
        port = [own]
        dist.broadcast_object_list(port)
        yield port[0]
