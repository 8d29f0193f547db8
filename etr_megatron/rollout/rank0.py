"""What one rank does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_rank0(body: Callable[[], T]) -> T:
    """What `body` returns on rank 0, or the exception that it raises there, on every rank. A collective."""
    box: list[tuple[bool, Any] | None] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = (True, body())
        except Exception as error:  # to be raised on every rank, this one included
            box[0] = (False, error)
    if dist.get_world_size() > 1:  # all of a step's tokens would be pickled for nobody
        dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    succeeded, found = box[0]
    if not succeeded:
        raise found
    return found
