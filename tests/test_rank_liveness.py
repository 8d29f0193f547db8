"""Which ranks are said to be there, of this machine and of others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch.distributed as dist

from etr_megatron.platform import rank_liveness
from etr_megatron.platform.rank_liveness import RankLiveness, RankProcess
from tests.runs import wait_for

pytestmark = pytest.mark.usefixtures("deadline")

AWAY = RankProcess("far", 7, "another kernel", "1")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(rank_liveness, "ANSWER_S", 1.0)
    monkeypatch.setattr(rank_liveness, "_LOOK_S", 0.02)


def test_ranks_of_one_machine_that_live_are_all_there_and_need_no_thread_to_say_so():
    threads = threading.active_count()
    assert RankLiveness(dist.HashStore(), 1, [RankProcess.own()] * 3).find_failure() is None
    assert threading.active_count() == threads


def test_a_process_that_has_ended_or_whose_pid_is_anothers_by_now_is_gone():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    own = RankProcess.own()
    try:
        # not waited for: its parent does not know it yet
        wait_for(lambda: rank_liveness._start_time(ended.pid) is None)
        assert os.path.exists(f"/proc/{ended.pid}")
        processes = [own, own, own._replace(pid=ended.pid), own._replace(start_time="1")]
        named = f"ranks 2 (pid {ended.pid} on {own.host}), 3 ({own})"
        assert RankLiveness(dist.HashStore(), 0, processes).find_failure() == f"{named} ended without a word, as after SIGKILL"
    finally:
        ended.wait()


def test_of_ranks_that_left_by_an_error_the_first_is_named_with_it():
    store = dist.HashStore()
    ranks = [RankLiveness(store, rank, [RankProcess.own()] * 3) for rank in range(3)]
    ranks[2].report_failure("ValueError: no")
    ranks[1].report_failure("RuntimeError: closed by peer")
    ranks[0].report_failure("RuntimeError: closed by peer")
    assert [one.find_failure() for one in ranks] == [f"rank 2 ({RankProcess.own()}) failed: ValueError: no"] * 2 + [None]


def test_that_the_job_was_told_to_stop_is_remembered_without_the_store():
    class Store(dist.HashStore):
        is_gone = False

        def check(self, keys):
            if self.is_gone:
                raise dist.DistNetworkError("no store")
            return super().check(keys)

    store, own = Store(), RankProcess.own()
    ranks = [RankLiveness(store, rank, [own, own]) for rank in range(2)]
    ranks[0].mark_stopped()
    assert ranks[1].check_after_sigterm() is None
    store.is_gone = True
    assert ranks[1].is_stopped


def test_a_rank_that_died_goes_before_those_that_failed_for_it():
    store, own = dist.HashStore(), RankProcess.own()
    ranks = [RankLiveness(store, rank, [own, own, own._replace(start_time="1")]) for rank in range(2)]
    ranks[1].report_failure("RuntimeError: closed by peer")
    assert ranks[0].find_failure() == f"rank 2 (pid {own.pid} on {own.host}) ended without a word, as after SIGKILL"


def test_a_rank_of_another_machine_answers_a_roll_call_and_one_that_does_not_is_named():
    store, own = dist.HashStore(), RankProcess.own()
    here = RankLiveness(store, 0, [own, AWAY, AWAY])
    assert here.find_failure() == "ranks 1 (pid 7 on far), 2 (pid 7 on far) gave no answer within 1 s"
    # As seen from there, it is rank 0 that is away.
    others = [RankLiveness(store, rank, [AWAY, own, own]) for rank in (1, 2)]
    assert [here.find_failure(), here.find_failure(), others[0].find_failure()] == [None] * 3
    others[1].report_failure("ValueError: no")
    assert here.find_failure() == "rank 2 (pid 7 on far) failed: ValueError: no"


def test_of_the_ranks_of_a_machine_that_are_told_to_stop_the_first_calls_the_roll_for_all():
    store, own = dist.HashStore(), RankProcess.own()
    ranks = [RankLiveness(store, rank, [own, own, AWAY]) for rank in range(2)]
    lost = "rank 2 (pid 7 on far) gave no answer within 1 s"
    assert [one.check_after_sigterm() for one in ranks] == [lost, lost]
    assert store.add("calls", 0) == 1 and not ranks[0].is_stopped
    store = dist.HashStore()
    ranks = [RankLiveness(store, rank, [own, own, AWAY]) for rank in range(2)]
    away = RankLiveness(store, 2, [AWAY, AWAY, own])
    assert [one.check_after_sigterm() for one in ranks] == [None, None]
    assert store.add("calls", 0) == 1 and away.is_stopped


def test_a_rank_that_is_told_alone_calls_it_itself():
    store, own = dist.HashStore(), RankProcess.own()
    second = RankLiveness(store, 1, [own, own, AWAY])
    away = RankLiveness(store, 2, [AWAY, AWAY, own])
    assert second.check_after_sigterm() is None and away.is_stopped


class Broken:
    """A store whose machine has lost power, or whose process has ended."""

    def __init__(self, hangs: bool) -> None:
        self.hangs, self.asked = hangs, 0

    def check(self, *_: Any) -> Any:
        self.asked += 1
        if self.hangs:
            threading.Event().wait()
        raise dist.DistNetworkError("closed by peer")

    set = add = get = check


@pytest.mark.parametrize("hangs", [True, False])
def test_without_the_store_a_rank_goes_on_and_knows_what_its_own_machine_shows(monkeypatch, hangs):
    monkeypatch.setattr(rank_liveness, "_STORE_S", 0.1)
    store, own = Broken(hangs), RankProcess.own()
    one = RankLiveness(store, 0, [own, own._replace(start_time="1"), own])
    one.report_failure("ValueError: no")
    assert one.find_failure() == f"rank 1 (pid {own.pid} on {own.host}) ended without a word, as after SIGKILL"
    assert not one.is_stopped
    one.mark_stopped()
    assert one.is_stopped
    assert store.asked == 1 if hangs else store.asked > 1
    assert RankLiveness(store, 0, [own, own]).find_failure() is None
    assert (
        RankLiveness(store, 0, [own, AWAY]).find_failure()
        == "the job's store, which tells of ranks of other machines, gave no answer"
    )


def test_the_word_that_the_job_was_told_to_stop_is_every_ranks():
    store = dist.HashStore()
    ranks = [RankLiveness(store, rank, [RankProcess.own()] * 2) for rank in range(2)]
    assert not ranks[0].is_stopped
    ranks[1].mark_stopped()
    assert ranks[0].is_stopped and ranks[1].is_stopped


def told() -> tuple[list[str], bool]:
    """Places of all ranks as each sees them, and whether rank 0 hears of a SIGTERM to the last; on gang ranks."""
    ranks = RankLiveness.of_job()
    if dist.get_rank() == dist.get_world_size() - 1:
        ranks.mark_stopped()
    dist.barrier()
    return [str(place) for place in ranks._processes], ranks.is_stopped


def test_ranks_of_a_job_know_where_the_others_are(gangs):
    first, second = gangs(2).run("tests.test_rank_liveness:told")
    assert first == second and len(set(first[0])) == 2 and first[1]
