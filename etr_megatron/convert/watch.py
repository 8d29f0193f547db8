"""Detects and names ranks that stop silently, because their machine is gone or they are suspended.

The ranks of a conversion may wait for hours for each other's share, so their collectives cannot have a short timeout. The end
of a process is noticed because its connections close. A process that hangs would not be noticed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch.distributed as dist

from etr_megatron.convert.ranks import Ranks
from etr_megatron.platform.background import background_thread
from etr_megatron.platform.heartbeat import Heartbeat

BEAT_S = 5.0
"""Interval of a rank's heartbeats. Reading and writing files do not delay them."""

SILENCE_S = 120.0
"""Silence after which a rank is considered lost."""


@contextmanager
def detecting_silent_ranks(ranks: Ranks, give_up: Callable[[str], None]) -> Iterator[None]:
    """Send heartbeats while the block runs; give_up(message naming silent ranks) is called, once, in another thread.

    That thread cannot stop a collective: `give_up` must end the process.
    """
    if ranks.world == 1:
        yield
        return
    store = dist.PrefixStore("signs of life", dist.distributed_c10d._get_default_store())
    with background_thread(lambda done: _watch(store, ranks.rank, ranks.world, done, give_up), "watch"):
        yield


@contextmanager
def _within(seconds: float, late: Callable[[], None]) -> Iterator[None]:
    """Call `late`, in another thread, when the block takes longer: a store whose machine is gone may not answer for long."""
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _watch(store: dist.Store, rank: int, world: int, done: threading.Event, give_up: Callable[[str], None]) -> None:
    others = {other: Heartbeat(store, f"beats/{other}") for other in range(world) if other != rank}
    unanswered = partial(give_up, f"rank 0's machine has not answered for {SILENCE_S:g} s")
    try:
        while not done.is_set():
            with _within(SILENCE_S, unanswered):
                store.add(f"beats/{rank}", 1)
                others = {other: heart for other, heart in others.items() if not store.check([f"done/{other}"])}
                silent = [other for other, heart in others.items() if heart.silence_s() > SILENCE_S]
            if silent:
                names = f"ranks {', '.join(map(str, silent))} have" if len(silent) > 1 else f"rank {silent[0]} has"
                give_up(f"{names} given no sign of life for {SILENCE_S:g} s")
                return
            done.wait(BEAT_S)
        with _within(SILENCE_S, unanswered):
            store.set(f"done/{rank}", "")
    except RuntimeError:
        return  # the process with the store is gone: this rank's connections fail too
