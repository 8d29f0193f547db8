"""What the other ranks do while rank 0 works for all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from array import array
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from etr_megatron.errors import UserError
from etr_megatron.rollout import NeedsSyncError, rank0
from etr_megatron.types import Sample
from tests import warm
from tests.ports import reserved_port
from tests.runs import wait_for

pytestmark = pytest.mark.usefixtures("deadline")
PROGRAM = """
import contextlib, datetime, os, signal, sys, threading, time
import torch.distributed as dist
from etr_megatron.rollout import rank0
from tests.hang import collectives_within
case, port, outputs = sys.argv[1], int(sys.argv[2]), sys.argv[4:]
os.setsid()
rank0.BEAT_S, rank0.SILENCE_S, rank0.LATE_S = 0.2, float(sys.argv[3]), float(sys.argv[3]) + 1
rank = int(os.fork() == 0)  # one process has imported everything for both
os.dup2(os.open(outputs[rank], os.O_WRONLY | os.O_CREAT), 1)
store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == (1 if case in ("stops", "absent") else 0))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=300))
dist.barrier()  # on a busy machine one may be there long before the other
if case == "left":  # by the ranks of an earlier start, whose store this is
    for number in range(4):
        for word in ("stop", "done"):
            dist.distributed_c10d._get_default_store().set(f"on_rank0/{number}/{word}", "")

def body():
    if case == "stops":
        print("stopping", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    if case == "fails":
        raise ValueError("no servers")
    if case in ("long", "left"):
        store.wait(["waits"], datetime.timedelta(seconds=300))
        time.sleep(4)  # more than a collective may take
    while case == "short" and not store.check(["given up"]):
        time.sleep(0.05)
    return "groups"

def until_stopped(anywhere):
    while not anywhere():
        time.sleep(0.05)
    raise InterruptedError("told to stop")

try:
    if case == "stopped":  # rank 1 is told while rank 0 works, and what rank 0 learns from it
        asked = threading.Event()
        threading.Timer(1.0 if rank else 1000, asked.set).start()
        rank0.on_rank0_until_stopped(until_stopped, asked.is_set)
    if case == "left":
        rank0.on_rank0_until_stopped(lambda anywhere: print("stop" if anywhere() else "go on"), lambda: False)
    if rank:
        store.set("waits", "")
    if case == "absent":
        rank0.on_rank0(lambda: None, long=True)  # makes the connection, in which both take part
        if not rank:
            os.kill(os.getpid(), signal.SIGSTOP)
    with collectives_within(2) if rank and case in ("long", "short", "left") else contextlib.nullcontext():
        print(rank0.on_rank0(body, long=case != "short"))
    print(rank0.on_rank0(lambda: "again", long=True), flush=True)
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    if rank:
        store.set("given up", "")
os.rename(outputs[rank], outputs[rank] + ".whole")
os._exit(0)
"""


@pytest.fixture
def run_ranks(tmp_path):
    """The output of rank 0 and rank 1; if rank 0 stops, only of rank 1."""
    outputs, log = [str(tmp_path / f"rank{rank}") for rank in range(2)], tmp_path / "log"
    whole = [Path(f"{output}.whole") for output in outputs]

    def run(case: str, silence_s: float = 300) -> list[str]:
        with reserved_port() as port:
            command = [sys.executable, "-c", PROGRAM, case, str(port), str(silence_s), *outputs]
            ranks, wanted = warm.start(command, {**os.environ}, log), whole[case in ("stops", "absent") :]
            try:
                wait_for(lambda: all(one.exists() for one in wanted) or ranks.poll() not in (None, 0))
                assert all(one.exists() for one in wanted), log.read_text()
                return [one.read_text() for one in wanted]
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(ranks.pid, signal.SIGKILL)
                ranks.wait()
                for one in wanted:
                    one.unlink(missing_ok=True)

    return run


@pytest.mark.slow
def test_what_takes_longer_than_a_collective_may_is_waited_for_as_long_as_rank_0_lives(run_ranks):
    assert run_ranks("long") == ["groups\nagain\n"] * 2
    assert "groups" not in run_ranks("short")[1]  # without `long`, a collective's limit applies


@pytest.mark.slow
def test_what_the_ranks_of_an_earlier_start_have_left_in_the_store_is_not_read(run_ranks):
    assert run_ranks("left") == ["go on\ngroups\nagain\n", "groups\nagain\n"]


def test_an_error_of_rank_0_is_every_ranks(run_ranks):
    assert run_ranks("fails") == ["ValueError: no servers\n"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("case", "seconds"), [("stops", 6), ("absent", 7)])  # it may come later than it may be silent
def test_a_rank_0_that_stops_without_a_word_is_named(run_ranks, case, seconds):
    assert run_ranks(case, silence_s=6) == [f"TimeoutError: rank 1: rank 0 has given no sign of life for {seconds} s\n"]


def test_rank_0_learns_while_it_works_that_another_rank_must_stop(run_ranks):
    assert run_ranks("stopped") == ["InterruptedError: told to stop\n"] * 2


def spread(piece: int, count: int) -> list[Sample]:
    """Rank 0's samples, as every rank gets them."""
    samples = [Sample(i, [i, 7], [-0.5, -i], "stop", i, routing=array("B", [i % 256] * 40)) for i in range(count)]
    with mock.patch.object(rank0, "PIECE", piece):
        return rank0.on_rank0(lambda: samples if dist.get_rank() == 0 else [])


def shared_in_part(fails: bool) -> list[int]:
    """What ranks get when rank 0 shares only a part."""

    def odd(found: list[int]) -> list[int]:
        if fails:
            raise ValueError("not to be shared")
        return found[1::2]

    return rank0.on_rank0(lambda: [1, 2, 3, 4], share=odd)


def test_what_rank_0_does_not_share_it_keeps_for_itself(gangs):
    assert gangs(2).run(f"{__name__}:shared_in_part", fails=False) == [[1, 2, 3, 4], [2, 4]]
    with pytest.raises(AssertionError) as caught:
        gangs(2).run(f"{__name__}:shared_in_part", fails=True)
    assert str(caught.value).count("ValueError: not to be shared") >= 2


class OfTwoError(UserError):
    def __init__(self, who: str, what: str) -> None:
        super().__init__(f"{who} has no {what}")


def error_of_rank_0(error: str) -> tuple[str, str]:
    """What this rank gets of it, after which all can go on."""

    def body() -> None:
        if error == "of two":
            raise OfTwoError("server 3", "weights")
        found = NeedsSyncError("the last server")
        if error == "unpicklable":
            found.lock = threading.Lock()
        raise found

    try:
        rank0.on_rank0(body)
    except Exception as caught:
        assert rank0.on_rank0(lambda: "again") == "again"
        return type(caught).__name__, str(caught)
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "own", "others"),
    [
        ("as it is", ("NeedsSyncError", "the last server"), ("NeedsSyncError", "the last server")),
        ("of two", ("OfTwoError", "server 3 has no weights"), ("UserError", "server 3 has no weights")),
        ("unpicklable", ("NeedsSyncError", "the last server"), ("RuntimeError", "rank 0 failed: the last server")),
    ],
)
def test_rank_0_raises_its_own_error_and_the_others_what_can_be_pickled_of_it(gangs, error, own, others):
    assert gangs(2).run(f"{__name__}:error_of_rank_0", error=error) == [own, others]


@pytest.mark.parametrize("piece", [1 << 20, 1000, 7])
def test_what_rank_0_has_is_every_ranks_in_however_many_pieces_it_travels(gangs, piece):
    alone, *others = gangs(3).run("tests.test_rank0:spread", piece=piece, count=30)
    assert len(alone) == 30 and alone[29].routing == array("B", [29] * 40) and others == [alone, alone]
