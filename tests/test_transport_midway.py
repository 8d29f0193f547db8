"""A rank that raises, dies or hangs when half of the weights have arrived: all others end and name it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from typing import Any

import pytest

from tests import warm
from tests.ports import reserved_port

RANKS = [
    ("whole", 2, 0, 0),
    ("whole", 2, 0, 1),
    ("sharded", 2, 1, 1),
    ("sharded", 1, 2, 2),
    ("disk", 2, 0, 0),
    ("disk", 2, 0, 1),
]
"""Transport, training ranks, servers, and the rank at fault: the root, one from which it gathers, or a receiver."""


def check_others(found: list[dict[str, Any] | None], culprit: int, message: str, within_s: float) -> None:
    for rank, one in enumerate(found):
        if rank == culprit:
            continue
        assert re.search(message, one["error"]), one["error"]
        assert one["seconds"] < within_s
        assert one["complete"] is None


@pytest.mark.parametrize(("kind", "tp", "servers", "culprit"), RANKS)
def test_a_rank_that_raises_is_named_with_its_reason_at_once(gangs, hf_models, tmp_path, kind, tp, servers, culprit):
    found = gangs(tp + servers).run(
        "tests.transport_fault_jobs:midway",
        kind=kind,
        model=hf_models["llama"],
        tp=tp,
        servers=servers,
        culprit=culprit,
        fault="raise",
        directory=str(tmp_path),
    )
    check_others(found, -1, rf"version 3 did not complete: rank {culprit} failed: OSError: the device fell off$", 50)
    if kind == "disk":
        assert [path.name for path in tmp_path.iterdir()] == ["version_000002"]


def processes(arguments: dict[str, Any], store: str, world: int) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each rank of a separate world."""
    command = [sys.executable, "-m", "tests.transport_fault_jobs", store]
    ranks = [warm.start([*command, str(rank), str(world), json.dumps(arguments)], {**os.environ}) for rank in range(world)]
    try:
        printed = [rank.communicate(timeout=600) for rank in ranks]
        return [(rank.returncode, *both) for rank, both in zip(ranks, printed, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tp", "servers", "culprit"), [RANKS[0], RANKS[2], RANKS[5]])
def test_a_rank_that_is_killed_is_named_at_once(hf_models, tmp_path, kind, tp, servers, culprit):
    arguments = dict(kind=kind, model=hf_models["llama"], tp=tp, servers=servers, culprit=culprit, fault="kill")
    with reserved_port() as port:
        store = f"tcp://127.0.0.1:{port}" if culprit == 0 else f"file://{tmp_path}/store"
        ranks = processes({**arguments, "directory": str(tmp_path / "out")}, store, tp + servers)
    assert ranks[culprit][0] == -signal.SIGKILL
    for rank, (code, _, err) in enumerate(ranks):
        assert rank == culprit or code == 0, err
    found = [json.loads(out) if out else None for _, out, _ in ranks]
    who = "the process that owns the store" if culprit == 0 else f"rank {culprit}"  # with tcp://, rank 0 owns it
    check_others(found, culprit, rf"version 3 did not complete: {who} is gone", 50)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tp", "servers", "culprit"), [RANKS[1], RANKS[3], RANKS[4]])
def test_a_rank_that_hangs_is_named_at_the_deadline(gangs, hf_models, tmp_path, kind, tp, servers, culprit):
    arguments = dict(kind=kind, model=hf_models["llama"], tp=tp, servers=servers, culprit=culprit, fault="hang")
    found = gangs(tp + servers).run("tests.transport_fault_jobs:midway", **arguments, directory=str(tmp_path), timeout_s=3)
    check_others(found, culprit, rf"version 3 did not complete: rank {culprit} did not arrive within 3 s", 50)
