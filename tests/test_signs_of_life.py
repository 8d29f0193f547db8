"""Heartbeats that another process is watched by, and the threads that send them."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from etr_megatron.platform.background import background_thread
from etr_megatron.platform.heartbeat import Heartbeat


def test_silence_is_counted_from_the_last_new_beat_that_was_seen(monkeypatch):
    now, store = [1000.0], dist.HashStore()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store.add("beats", 7)  # before it is watched
    heart = Heartbeat(store, "beats")
    found = []
    for seconds, beats in ((0.5, 0), (3.0, 0), (4.0, 1), (2.0, 0), (60.0, 5), (1.0, 0), (1.5, 0)):
        now[0] += seconds
        store.add("beats", beats)
        found.append(heart.silence_s())
    assert found == [0.0, 3.0, 0.0, 2.0, 0.0, 1.0, 2.5]
    assert store.add("beats", 0) == 13  # watching is not a beat


@pytest.mark.parametrize("fails", [False, True])
def test_work_beside_a_block_has_ended_when_the_block_has_however_that_ends(fails):
    seen: list[str] = []

    def work(done: threading.Event) -> None:
        thread = threading.current_thread()
        seen.append(f"{thread.name} {thread.daemon} {done.is_set()}")
        begun.set()
        assert done.wait(300)
        time.sleep(0.1)
        seen.append("ended")

    begun = threading.Event()
    try:
        with background_thread(work, "beats"):
            assert begun.wait(300)  # it runs at the same time
            seen.append("block")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        seen.append("interrupted")
    assert seen == ["beats True False", "block", "ended", *["interrupted"] * fails]
