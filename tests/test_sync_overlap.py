"""The next bucket of a weight sync is made while the previous one is sent, in all transports: the order of events."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from etr_megatron.rollout.sglang.senders import SendQueue
from etr_megatron.weights import ServerLayout, TrainingLayout, read_architecture
from etr_megatron.weights.reshard import make_reshard_plan
from etr_megatron.weights.transport import DiskWriter, Wire, disk, exchange
from tests.test_reshard_plan import architecture
from tests.transport_jobs import shards_from


def test_a_send_queue_has_one_bucket_under_way_while_the_next_is_gathered():
    """For `broadcast` and `tensor`."""
    posted: list[tuple[str, Future[None]]] = []

    def post(bucket: str) -> Future[None]:
        posted.append((bucket, Future()))
        return posted[-1][1]

    send_queue = SendQueue(post)
    send_queue.put("first")  # returns with the bucket under way, else this test would hang here
    second = threading.Thread(target=send_queue.put, args=("second",))
    second.start()
    second.join(0.2)
    assert [bucket for bucket, _ in posted] == ["first"] and second.is_alive()
    posted[0][1].set_result(None)
    second.join(300)
    assert [bucket for bucket, _ in posted] == ["first", "second"]
    posted[1][1].set_exception(RuntimeError("the server is gone"))
    send_queue.put("dropped")
    with pytest.raises(RuntimeError, match="the server is gone"):
        send_queue.flush()
    assert len(posted) == 2


def test_a_round_between_shards_is_packed_while_the_one_before_travels(monkeypatch):
    """For `sharded`."""
    events: list[str] = []
    monkeypatch.setattr(exchange, "MIN_BUCKET_BYTES", 1 << 10)
    monkeypatch.setattr(exchange, "pack", lambda *_: events.append("pack"))
    staged = SimpleNamespace(nbytes=0, messages=lambda flat: [flat])
    monkeypatch.setattr(exchange, "stage", lambda *_, **__: staged)

    def travel(sends: list, _receives: list) -> list:
        events.append("send") if sends else None
        return sends

    wire = SimpleNamespace(rank=0, device=torch.device("cpu"), exchange=travel)
    wire.wait = lambda works: events.append("sent") if works else None
    plan = make_reshard_plan(TrainingLayout(), ServerLayout(), architecture(), destination_start=1)
    run = exchange.Exchange(plan, wire, exchange.Memory(wire.device), dtype=torch.float32, bucket_bytes=1 << 10)
    run.run({}, {})
    rounds = events.count("send")
    assert rounds > 3
    assert events == ["pack", "send", *["pack", "sent", "send"] * (rounds - 1), "sent"]


def order_on_disk(directory: str, model: str) -> list[str]:
    """Runs in a gang: the order of events when a version of several files is written.

    Writing a file waits until the next file is gathered, if there is one, for at most a minute.
    """
    arch, events, gathered = read_architecture(model), [], threading.Semaphore(0)
    wire = Wire.in_world(timeout_s=60)
    writer = DiskWriter(directory, TrainingLayout(), arch, wire, dtype=torch.float32, file_bytes=60_000)
    gather, write, files = writer._gather.run, disk._write_file, len(writer._own)

    def group(number: int, *arguments: Any) -> Any:
        found = gather(number, *arguments)
        events.append(f"gathered {number}")
        if number:
            gathered.release()
        return found

    def slow(file: Path, tensors: dict[str, Tensor]) -> None:
        number = int(file.stem[-5:])
        events.append(f"writing {number}")
        if number < files - 1:
            gathered.acquire(timeout=60)
        write(file, tensors)
        events.append(f"written {number}")

    writer._gather.run = group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "_write_file", slow)
        writer.sync(1, shards_from(model, TrainingLayout(), 0))
    writer.close()
    return events


@pytest.mark.slow
def test_a_file_is_gathered_while_the_one_before_is_written(gangs, hf_models, tmp_path):
    """For `disk`."""
    job = dict(directory=str(tmp_path), model=hf_models["qwen3"])
    events = gangs(1).run("tests.test_sync_overlap:order_on_disk", **job)[0]
    files = sum(event.startswith("gathered") for event in events)
    assert files > 2
    for number in range(files - 1):
        assert events.index(f"gathered {number + 1}") < events.index(f"written {number}")
        assert events.index(f"written {number}") < events.index(f"writing {number + 1}")
