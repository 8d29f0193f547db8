"""What one rank does for all."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from etr_megatron.platform.background import beside

T = TypeVar("T")

BEAT_S = 2.0
"""How often rank 0 says that it lives while the others wait for something long."""

SILENCE_S = 60.0
"""After which it is taken for lost. Where its process ends, torchrun ends the others before that."""

_LONGEST_PAUSE_S, _GROWTH = 0.1, 1.2
"""Between two looks of a waiting rank, of which there may be hundreds."""

_numbers = itertools.count()


def on_rank0(body: Callable[[], T], *, long: bool = False) -> T:
    """What `body` returns on rank 0, or the exception that it raises there, on every rank. A collective.

    long: it may take longer than the group's deadline for a collective, as generating does: the others wait for as long as rank
    0 gives signs of life, and raise TimeoutError when it does not. `body` then needs deadlines of its own.
    """
    if long and dist.get_world_size() > 1:
        # A connection of its own: another thread's wait on the default one would keep it from being used.
        store = dist.distributed_c10d._get_default_store().clone()
        return _broadcast(body, dist.PrefixStore(f"on_rank0/{next(_numbers)}", store))
    return _broadcast(body, None)


def _broadcast(body: Callable[[], T], signs: dist.Store | None) -> T:
    box: list[tuple[bool, Any] | None] = [None]
    if dist.get_rank() == 0:
        with _signs_of_life(signs):
            try:
                box[0] = (True, body())
            except Exception as error:  # to be raised on every rank, this one included
                box[0] = (False, error)
    elif signs is not None:
        _wait_for(signs)
    if dist.get_world_size() > 1:  # all of a step's tokens would be pickled for nobody
        dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    succeeded, found = box[0]
    if not succeeded:
        raise found
    return found


@contextmanager
def _signs_of_life(store: dist.Store | None) -> Iterator[None]:
    """Given in another thread while the block runs; "done" in the end."""
    if store is None:
        yield
        return

    def beat(done: threading.Event) -> None:
        while not done.wait(BEAT_S):
            store.add("beats", 1)

    try:
        with beside(beat, "signs_of_life"):
            yield
    finally:
        store.set("done", "")


def _wait_for(store: dist.Store) -> None:
    """Until rank 0 is done."""
    seen, last, pause = -1, time.monotonic(), 0.0005
    while not store.check(["done"]):
        beats = store.add("beats", 0)
        if beats != seen:
            seen, last = beats, time.monotonic()
        elif time.monotonic() - last > SILENCE_S:
            raise TimeoutError(f"rank {dist.get_rank()}: rank 0 has given no sign of life for {SILENCE_S:g} s")
        time.sleep(pause)
        pause = min(_GROWTH * pause, _LONGEST_PAUSE_S)
