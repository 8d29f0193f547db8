"""Ranks of one machine that act as nodes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def own_address() -> str:
    """Non-loopback address of this machine; skips the test if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address; this only looks up the route
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


@contextmanager
def as_a_node_at(address: str) -> Iterator[None]:
    """Make this rank the first of its node, with the job's first node at this address."""
    before = {name: os.environ.get(name) for name in ("LOCAL_RANK", "MASTER_ADDR")}
    os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": address}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
