"""Work that rank 0 does for all ranks."""

from __future__ import annotations

import io
import itertools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from etr_megatron import platform
from etr_megatron.platform.all_ranks import picklable_error
from etr_megatron.platform.background import background_thread
from etr_megatron.platform.heartbeat import Heartbeat
from etr_megatron.platform.job_store import job_store, own_connection

T = TypeVar("T")

BEAT_S = 2.0
"""Interval in seconds of rank 0's heartbeats while the other ranks wait for long work."""

SILENCE_S = 60.0
"""Seconds without a heartbeat after which rank 0 is considered lost. If its process ends, torchrun ends the others sooner."""

LATE_S = 600.0
"""The same before rank 0's first heartbeat: it may still be in work without the other ranks, such as stopping servers."""

PIECE = 64 << 20
"""Bytes per broadcast."""

_MAX_PAUSE_S, _GROWTH = 0.1, 1.2
"""Waiting ranks poll the store at intervals that grow by this factor up to this maximum: there may be hundreds of ranks."""

_numbers = itertools.count()
_connection: tuple[Any, dist.Store] | None = None


def whole(found: Any) -> Any:
    """The value itself, unchanged."""
    return found


def of_rank0(own: T | None) -> T:
    """Assert that a value that only rank 0 has is present, and return it. Call it on rank 0 alone."""
    assert own is not None
    return own


def on_rank0(body: Callable[[], T], *, long: bool = False, share: Callable[[T], Any] = whole) -> T:
    """Run `body` on rank 0; return its result, or raise its exception, on every rank. A collective.

    If the exception cannot be sent as it is, the other ranks get what `picklable_error` makes of it, such as a RuntimeError.
    long: `body` may take longer than the group's timeout for collectives, as generation does. The others wait as long as rank 0
    sends heartbeats, and raise TimeoutError when these stop. `body` then needs its own timeouts.
    share: maps the result to what the other ranks get, without the parts that only rank 0 needs.
    """
    return _broadcast(body, _signs() if long else None, share)


def on_rank0_until_stopped(
    body: Callable[[Callable[[], bool]], T], must_stop: Callable[[], bool], share: Callable[[T], Any] = whole
) -> T:
    """As `on_rank0` with `long`. `body` is passed a function that returns whether `must_stop()` is true on any rank."""
    signs = _signs()

    def anywhere() -> bool:
        return must_stop() or (signs is not None and signs.check(["stop"]))

    return _broadcast(lambda: body(anywhere), signs, share, must_stop)


def _signs() -> dist.Store | None:
    """The store in which ranks signal each other during one call; None with a single rank. A collective.

    All calls share one connection, because a weight sync makes several calls on hundreds of ranks. The two keys of each call
    stay in the store: some kilobytes in a thousand steps.
    """
    global _connection
    world = dist.group.WORLD
    if dist.get_world_size() == 1:
        return None
    if _connection is None or _connection[0] is not world:
        _connection = world, own_connection(job_store())
    return dist.PrefixStore(f"on_rank0/{next(_numbers)}", _connection[1])


def _broadcast(
    body: Callable[[], T], signs: dist.Store | None, share: Callable[[T], Any], must_stop: Callable[[], bool] = lambda: False
) -> T:
    own: tuple[bool, Any] | None = None
    others: tuple[bool, Any] | None = None
    if dist.get_rank() == 0:
        with _signs_of_life(signs):
            try:
                own = True, body()
                others = True, share(own[1])
            except Exception as error:  # to be raised on every rank, this one included
                own, others = (False, error), (False, picklable_error(error, keep_class=True))
    elif signs is not None:
        _wait_for(signs, must_stop)
    if dist.get_world_size() > 1:  # with a single rank, pickling all of a step's tokens would be wasted
        others = _shared(others)
    outcome = own or others
    assert outcome is not None  # rank 0 has its own, and shares it with the others
    succeeded, found = outcome
    if not succeeded:
        raise found
    return found


def _shared(own: Any) -> Any:
    """Rank 0's object, pickled for the others.

    With NCCL it goes through GPU memory piece by piece, because servers may have filled the GPUs.
    """
    device, is_source = platform.device(), dist.get_rank() == 0
    given = io.BytesIO()  # torch takes its buffer without a copy
    if is_source:
        pickle.dump(own, given)
    size = torch.tensor(given.tell(), device=device)
    dist.broadcast(size, src=0)
    pickled = torch.frombuffer(given.getbuffer() if is_source else bytearray(int(size)), dtype=torch.uint8)
    for piece in pickled.split(PIECE):
        moved = piece.to(device)
        dist.broadcast(moved, src=0)
        if moved is not piece and not is_source:
            piece.copy_(moved)
    return own if is_source else pickle.loads(pickled.numpy().data)


@contextmanager
def _signs_of_life(store: dist.Store | None) -> Iterator[None]:
    """Send heartbeats from another thread while the block runs; set "done" at the end."""
    if store is None:
        yield
        return

    store.add("beats", 1)  # it has begun

    def beat(done: threading.Event) -> None:
        while not done.wait(BEAT_S):
            store.add("beats", 1)

    try:
        with background_thread(beat, "signs_of_life"):
            yield
    finally:
        store.set("done", "")


def _wait_for(store: dist.Store, must_stop: Callable[[], bool]) -> None:
    """Wait until rank 0 is done; notify rank 0 when this rank must stop."""
    heart, pause, told = Heartbeat(store, "beats"), 0.0005, False
    while not store.check(["done"]):
        if not told and must_stop():
            store.set("stop", "")
            told = True
        silence_s, limit_s = heart.silence_s(), SILENCE_S if heart.has_beaten else LATE_S
        if silence_s > limit_s:
            raise TimeoutError(f"rank {dist.get_rank()}: rank 0 has given no sign of life for {limit_s:g} s")
        time.sleep(pause)
        pause = min(_GROWTH * pause, _MAX_PAUSE_S)
