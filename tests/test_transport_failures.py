"""A sync that fails: every rank names the rank at fault, and no receiver takes mixed weights for a version."""

from __future__ import annotations

import gc
import re
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, TCPStore

from etr_megatron.weights import ServerLayout, TrainingLayout
from etr_megatron.weights.checksum import _CHUNK, checksum
from etr_megatron.weights.transport import SyncError, Wire
from etr_megatron.weights.transport.board import Board
from etr_megatron.weights.transport.server_loader import Offer
from tests.ports import reserved_port
from tests.test_reshard_plan import architecture


@pytest.mark.slow
@pytest.mark.parametrize(
    ("culprit", "fault", "message"),
    [
        (1, "absent", r"weight sync of version 3 did not complete: rank 1 did not arrive within 3 s"),
        (0, "hang", r"weight sync of version 3 did not complete: rank 0 did not arrive within 3 s"),
        (1, "lose_connection", r"weight sync of version 3 did not complete: rank 1 is gone: the connection was lost"),
        (
            2,
            "wrong_shape",
            r"rank 2 failed: ValueError: .*decoder\.final_layernorm\.weight has shape \(47,\), but \(48,\) in the plan",
        ),
        (0, "raise", r"rank 0 failed: OSError: the device fell off"),
        (
            2,
            "flip",
            r"rank 2 failed: pieces that differ .*: 1, first model\.layers\.2\.mlp\.down_proj\.weight .*, "
            r"\[48, 40\] from \[0, 0\] on, sent by source rank 0",
        ),
    ],
)
def test_every_rank_names_who_is_at_fault_and_nobody_has_a_version(gangs, hf_models, culprit, fault, message):
    found = gangs(3).run(
        "tests.transport_jobs:failing",
        model=hf_models["llama"],
        source=TrainingLayout(tp=2),
        destination=ServerLayout(),
        culprit=culprit,
        fault=fault,
    )
    for rank, one in enumerate(found):
        assert one["after"] == 4
        if rank == culprit and fault == "absent":
            continue
        first, second = one["errors"]
        assert "this transport has failed before" in second
        # A rank that was away finds the others gone.
        if rank != culprit or fault not in ("hang", "lose_connection"):
            assert re.search(message, first), first
            assert one["seconds"] < 50  # less than the minute for which a rank hangs, or for which others would wait for it
        # If the fault came before the begin, nothing was written, and the previous version is still there.
        assert one["complete"] == ([2, 2] if fault in ("wrong_shape", "absent") else [None, None])


@pytest.mark.slow
def test_a_rank_that_nobody_waits_for_says_where_it_looked():
    with reserved_port() as port:
        offer = Offer(3, "127.0.0.1", port, 0, TrainingLayout(), ServerLayout(), architecture(), timeout_s=1)
        with pytest.raises(SyncError, match=rf"rank 1 did not reach rank 0 within 1 s at 127\.0\.0\.1:{port}"):
            offer.store()
    with pytest.raises(SyncError, match=r"the opening of the weight sync did not complete: rank 1 did not arrive within 1 s"):
        Wire(HashStore(), 0, 2, timeout_s=1)


def test_a_closed_wire_still_says_why_and_its_store_is_gone_once_nobody_has_it():
    with reserved_port() as port:

        def open_store() -> TCPStore:
            return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

        wire = Wire(open_store(), 0, 1, timeout_s=5)
        wire.board.report("OSError: the device fell off")
        wire.close()
        assert "rank 0 failed: OSError: the device fell off" in str(wire.board.failure())
        with pytest.raises(RuntimeError, match="address already in use"):
            open_store()
        del wire
        gc.collect()  # frees the error above
        open_store()


def test_a_board_keeps_nothing_of_syncs_that_are_over():
    store = HashStore()
    board, sizes = Board(store, 0, 1, timeout_s=5), []
    for version in range(6):
        board.start(version)
        for phase in ("begin", "directory", "written", "end"):
            board.barrier(phase)
        sizes.append(store.num_keys())
    assert sizes == [12, 24, 24, 24, 24, 24]


def test_a_rank_that_looks_at_a_meeting_late_passes_it_although_another_has_failed_since():
    """Otherwise the ranks of one server would disagree on whether the previous version was given up."""
    store = HashStore()
    boards = [Board(store, rank, 2, timeout_s=5) for rank in (0, 1)]
    for board in boards:
        board.start(7)

    class Slow:
        """A store whose first reply is outdated when it arrives."""

        def __init__(self) -> None:
            self.asked = 0

        def check(self, keys: list[str]) -> bool:
            self.asked += 1
            assert len(keys) == 1  # however many ranks there are
            if self.asked == 1:
                boards[0].barrier("begin")
                boards[0].report("OSError: the device fell off")
                return False
            return store.check(keys)

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

    boards[1]._store = Slow()
    boards[1].barrier("begin")
    assert boards[1]._store.asked > 1
    with pytest.raises(SyncError, match="version 7 did not complete: rank 0 failed: OSError: the device fell off"):
        boards[1].barrier("end")


class NeverDone:
    """An NCCL message that never completes."""

    def is_completed(self) -> bool:
        return False


def test_an_nccl_message_ends_when_another_rank_has_given_up():
    store = HashStore()
    wire = Wire.__new__(Wire)
    wire._backend, wire.board, wire._group, wire._subgroups = "nccl", Board(store, 0, 3, timeout_s=60), None, []
    other = Board(store, 2, 3, timeout_s=60)
    other.report("OSError: the device fell off")
    start = time.monotonic()
    with pytest.raises(SyncError, match="did not complete: rank 2 failed: OSError: the device fell off"):
        wire.wait([(1, NeverDone())])
    assert time.monotonic() - start < 50  # the deadline is 60


class NeverConnected:
    """An NCCL group whose first message to another rank waits for that."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def _start_coalescing(self) -> None: ...

    def send(self, *_: object) -> None: ...

    def _end_coalescing(self) -> None:
        self.gone.wait(60)

    def abort(self) -> None:
        self.gone.set()


def test_the_first_nccl_message_to_a_rank_that_hangs_ends_at_the_deadline_and_names_it():
    store, group = HashStore(), NeverConnected()
    boards = [Board(store, rank, 3, timeout_s=1.0) for rank in range(3)]
    for board in boards:
        board.start(7)
    wire = Wire.__new__(Wire)
    wire._backend, wire.board, wire._group, wire._subgroups, wire.bytes_sent = "nccl", boards[0], group, [], 0
    wire.device = torch.device("cpu")
    boards[2]._arrive("end")
    start = time.monotonic()
    boards[0]._phase = "end"
    with pytest.raises(SyncError, match="version 7 did not complete: rank 1 did not arrive within 1 s"):
        wire.exchange([(torch.zeros(3), 1)], [])
    assert time.monotonic() - start < 30 and group.gone.is_set()


@given(st.binary(min_size=1, max_size=70), st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_checksum_sees_every_change_of_one_byte(data, place, change):
    tensor = torch.tensor(list(data), dtype=torch.uint8)
    before = checksum(tensor)
    tensor[place % len(data)] ^= change
    assert checksum(tensor) != before


def murmur3(word):
    """The 64-bit finaliser as published for MurmurHash3, on Python integers."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 1):
        word = (word ^ word >> 33) * factor % 2**64
    return word


@given(st.lists(st.integers(0, 2**64 - 1), max_size=9))
@settings(max_examples=200, deadline=None)
def test_a_checksum_is_the_sum_of_words_and_places_scrambled(words):
    found = checksum(torch.tensor(words, dtype=torch.uint64))
    scrambled = (murmur3((word + place * 0x9E3779B97F4A7C15) % 2**64) for place, word in enumerate(words, start=1))
    assert found % 2**64 == (8 * len(words) + sum(scrambled)) % 2**64


def test_a_checksum_tells_a_word_from_the_one_that_is_complementary_to_it_at_its_place():
    """Both would give the same checksum if the scrambling shifted in the sign bit."""
    place = 0x9E3779B97F4A7C15
    other = (-1 - 12345 - 2 * place) % 2**64
    one, two = (checksum(torch.tensor([word], dtype=torch.uint64)) for word in (12345, other))
    assert one != two


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=9), st.data())
@settings(max_examples=200, deadline=None)
def test_a_checksum_sees_two_flipped_bits_and_exchanged_words(words, data):
    tensor = torch.tensor(words, dtype=torch.uint64).view(torch.int64)
    before = checksum(tensor)
    first, second = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=2, max_size=2, unique=True))
    flipped = tensor.clone()
    for place in (first, second):
        flipped[place] ^= -(2**63)  # the sign of a float: two flips cancel in a weighted sum
    assert checksum(flipped) != before
    swapped = tensor.clone()
    swapped[[first, second]] = tensor[[second, first]]
    assert (checksum(swapped) == before) == torch.equal(swapped, tensor)


def test_a_checksum_of_many_words_sees_exchanged_parts_of_them():
    """Words are weighted chunk by chunk."""
    first, second, rest = torch.arange(2 * _CHUNK + 5).split([_CHUNK, _CHUNK, 5])
    assert checksum(torch.cat((first, second, rest))) != checksum(torch.cat((second, first, rest)))


def test_a_checksum_sees_exchanged_parts_and_length_and_nothing_else():
    matrix = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).bfloat16()
    swapped = matrix.clone()
    swapped[[3, 200]] = matrix[[200, 3]]
    halves = torch.cat((matrix[150:], matrix[:150]))
    assert len({checksum(x) for x in (matrix, swapped, halves, matrix[:299], matrix.t())}) == 5
    assert checksum(torch.zeros(5)) != checksum(torch.zeros(6))
    assert checksum(matrix) == checksum(matrix.clone()) == checksum(torch.cat((matrix, matrix), 1)[:, :700])
    assert checksum(matrix[1:].view(torch.uint8)[:, 1:]) == checksum(matrix[1:].view(torch.uint8)[:, 1:].clone())
