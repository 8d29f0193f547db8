"""The next bucket of a weight sync is made while the one before travels, whatever the transport: by the order of events."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from etr_megatron.rollout.sglang.senders import Outbox
from etr_megatron.weights import ServerLayout, TrainingLayout
from etr_megatron.weights.plan import make_plan
from etr_megatron.weights.transport import exchange
from tests.test_plan import architecture


def test_an_outbox_has_one_bucket_under_way_while_the_next_is_gathered():
    """`broadcast` and `tensor`."""
    posted: list[tuple[str, Future[None]]] = []

    def post(bucket: str) -> Future[None]:
        posted.append((bucket, Future()))
        return posted[-1][1]

    outbox = Outbox(post)
    outbox.put("first")  # returns with the bucket under way, or this test would stand here
    second = threading.Thread(target=outbox.put, args=("second",))
    second.start()
    second.join(0.2)
    assert [bucket for bucket, _ in posted] == ["first"] and second.is_alive()
    posted[0][1].set_result(None)
    second.join(10)
    assert [bucket for bucket, _ in posted] == ["first", "second"]
    posted[1][1].set_exception(RuntimeError("the server is gone"))
    outbox.put("dropped")
    with pytest.raises(RuntimeError, match="the server is gone"):
        outbox.flush()
    assert len(posted) == 2


def test_a_round_between_shards_is_packed_while_the_one_before_travels(monkeypatch):
    """`sharded`."""
    events: list[str] = []
    monkeypatch.setattr(exchange, "SMALLEST_BUCKET", 1 << 10)
    monkeypatch.setattr(exchange, "pack", lambda *_: events.append("pack"))
    monkeypatch.setattr(exchange, "messages", lambda *_, **__: [torch.empty(0)])

    def travel(sends: list, _receives: list) -> list:
        events.append("send") if sends else None
        return sends

    wire = SimpleNamespace(rank=0, device=torch.device("cpu"), exchange=travel)
    wire.wait = lambda works: events.append("sent") if works else None
    plan = make_plan(TrainingLayout(), ServerLayout(), architecture(), destination_start=1)
    run = exchange.Exchange(plan, wire, dtype=torch.float32, bucket_bytes=1 << 10)
    run.run({}, {})
    rounds = events.count("send")
    assert rounds > 3
    assert events == ["pack", "send", *["pack", "sent", "send"] * (rounds - 1), "sent"]


def test_a_file_is_gathered_while_the_one_before_is_written(gangs, hf_models, tmp_path):
    """`disk`."""
    job = dict(directory=str(tmp_path), model=hf_models["qwen3"])
    events = gangs(1).run("tests.transport_jobs:order_on_disk", **job)[0]
    files = sum(event.startswith("gathered") for event in events)
    assert files > 2
    for number in range(files - 1):
        assert events.index(f"gathered {number + 1}") < events.index(f"written {number}")
        assert events.index(f"written {number}") < events.index(f"writing {number + 1}")
