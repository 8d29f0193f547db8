"""What one rank's failure is on the others, and the store in which ranks leave each other messages."""

from __future__ import annotations

import datetime
import errno
import os
import threading

import pytest
import torch.distributed as dist

from etr_megatron.errors import UserError
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.platform.job_store import job_store, own_connection
from etr_megatron.platform.phases import StopAskedError


class OddError(Exception):
    """Cannot be pickled."""

    def __reduce__(self):
        raise TypeError("not to be pickled")


def fail(how: str) -> None:
    if how == "user":
        raise UserError("make room")
    if how == "stop":
        raise StopAskedError("told to stop")
    if how == "odd":
        raise OddError("strange")
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")
    except OSError as error:
        if how == "disk":
            raise OddError("cannot write") from error
        raise UserError("run.dir is full") from error


def attempt(failing: dict[int, str], members: tuple[int, ...] = ()) -> tuple[str, ...] | int:
    """The error of this rank, or its result; `members` alone take part."""
    group = dist.new_group(members) if members else None
    rank = dist.get_rank()
    if members and rank not in members:
        return "absent"

    def work() -> int:
        if rank in failing:
            fail(failing[rank])
        return 10 * rank

    try:
        return on_all_ranks(work, group)
    except Exception as error:
        return type(error).__name__, str(error)


FULL = ("OSError", f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}")
USER, ROOM, ODD = ("UserError", "make room"), ("UserError", "run.dir is full"), ("OddError", "strange")


@pytest.mark.parametrize(
    ("failing", "wanted"),
    [
        ({}, [0, 10, 20]),
        ({1: "user"}, [USER, USER, USER]),
        ({2: "stop"}, [("StopAskedError", "told to stop")] * 3),
        ({1: "odd", 2: "user"}, [("RuntimeError", "rank 1 failed: strange"), ODD, USER]),
        ({0: "disk"}, [("OddError", "cannot write"), FULL, FULL]),
        ({0: "full for the user"}, [ROOM, ROOM, ROOM]),
    ],
    ids=["none", "user", "stop", "two", "full_disk", "full_disk_in_a_sentence"],
)
def test_an_error_of_one_rank_is_every_ranks_and_its_own_comes_first(gangs, failing, wanted):
    assert gangs(3).run(f"{__name__}:attempt", failing=failing) == wanted


def test_in_a_group_only_its_ranks_wait_for_and_fail_with_each_other(gangs):
    found = gangs(3).run(f"{__name__}:attempt", failing={2: "odd"}, members=(1, 2))
    assert found == ["absent", ("RuntimeError", "rank 2 failed: strange"), ODD]


def test_without_other_ranks_work_is_only_done():
    assert on_all_ranks(lambda: 5) == 5
    with pytest.raises(OddError, match="strange"):
        on_all_ranks(lambda: fail("odd"))


def messages(word: str) -> tuple[str, bool]:
    """What rank 1 has left for this rank, and whether it is in the world's store without a prefix."""
    store = job_store()
    if dist.get_rank() == 1:
        store.set(word, "from rank 1")
    dist.barrier()
    found = job_store().get(word) if job_store().check([word]) else b"nothing"
    return found.decode(), dist.distributed_c10d._get_default_store().check([word])


def test_a_message_in_the_jobs_store_is_there_for_every_rank(gangs):
    assert gangs(2).run(f"{__name__}:messages", word="stop") == [("from rank 1", False)] * 2


def test_messages_of_an_earlier_start_are_not_those_of_this_one():
    store = dist.HashStore()  # as torchrun keeps it through restarts
    for _ in range(2):
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            assert not job_store().check(["stop"])
            job_store().set("stop", "")
            assert job_store().check(["stop"])
        finally:
            dist.destroy_process_group()


def test_a_store_can_be_used_while_another_thread_waits_on_its_own_connection():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: list[bytes] = []
    own = own_connection(dist.PrefixStore("job", store))

    def wait() -> None:
        own.wait(["answer"], datetime.timedelta(seconds=300))
        found.append(own.get("answer"))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    done = threading.Thread(target=dist.PrefixStore("job", store).set, args=("answer", "yes"), daemon=True)
    done.start()
    waiting.join(300)
    assert found == [b"yes"]
