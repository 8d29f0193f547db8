"""Which try of a sharded weight sync a server's failure counts against."""

from __future__ import annotations

from types import SimpleNamespace

from etr_megatron.rollout.sglang import sharded_sender
from etr_megatron.rollout.sglang.sharded_sender import ShardedSender


def test_a_failure_that_is_reported_late_reaches_the_try_in_which_it_happened_and_not_the_next(monkeypatch):
    """Rank 0 alone. Servers a and b end during the first try; b's failure is reported only in the second, which has c alone."""
    reports, boards = [], []
    members = iter([[("a", 0), ("b", 0), ("c", 0)], [("c", 0)]])

    def transport(*_):
        said = []
        boards.append(said)

        def sync(*_):
            reports[0]("lost late" if len(boards) > 1 else "lost")
            if said:
                raise RuntimeError(said[0])

        return SimpleNamespace(wire=SimpleNamespace(board=SimpleNamespace(report=said.append)), sync=sync, close=lambda: None)

    calls = SimpleNamespace(
        members=lambda: next(members),
        post=lambda offer, report: reports.append(report),
        settle=lambda failed, refusals: failed,
    )
    opening = SimpleNamespace(report=lambda reason: None)
    offer = SimpleNamespace(board=lambda *_: opening, transport=transport, destination=SimpleNamespace(world=0))
    monkeypatch.setattr(sharded_sender, "at_servers", lambda body: body())
    monkeypatch.setattr(sharded_sender.dist, "get_rank", lambda: 0)
    sender = ShardedSender(settings=None, server=None, host="", calls=calls)
    monkeypatch.setattr(sender, "_offer", lambda *_: setattr(sender, "_store", object()) or offer)
    sender.send(SimpleNamespace(shards=dict), version=7)
    assert boards == [["lost", "lost late"], []]
