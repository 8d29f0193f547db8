"""A server that keeps failing is brought back at growing intervals; once it has served for long enough, they start over."""

from __future__ import annotations

from etr_megatron.rollout.sglang.restart_backoff import RestartBackoff


def syncs_with_an_attempt(comebacks: RestartBackoff, failed_at, count: int) -> list[int]:
    """Syncs with an attempt to bring back server a. failed_at(sync, last attempt): whether it has failed."""
    attempts: list[int] = []
    for sync in range(count):
        failed = ["a"] if failed_at(sync, attempts[-1] if attempts else None) else []
        if comebacks.due(failed) == ["a"]:
            attempts.append(sync)
    return attempts


def test_a_server_that_never_comes_back_is_tried_at_growing_distances_up_to_a_longest():
    attempts = syncs_with_an_attempt(RestartBackoff(["a", "b"]), lambda _sync, _last: True, 140)
    assert attempts == [0, 2, 6, 14, 30, 62, 94, 126]


def test_a_server_that_serves_for_as_long_as_its_pause_was_is_brought_back_at_once_the_next_time():
    # Fails at syncs 0 and 2; serves at 3 to 9, longer than the three syncs of its second pause; fails at 10 and stays away.
    attempts = syncs_with_an_attempt(RestartBackoff(["a", "b"]), lambda sync, _last: sync <= 2 or sync >= 10, 20)
    assert attempts == [0, 2, 10, 12, 16]


def test_a_server_that_dies_soon_after_every_start_is_tried_at_growing_distances():
    def dies_after_one_sync(sync: int, last: int | None) -> bool:
        return last is None or sync > last + 1

    assert syncs_with_an_attempt(RestartBackoff(["a", "b"]), dies_after_one_sync, 60) == [0, 2, 6, 14, 30]


def test_an_attempt_that_does_not_count_is_made_again_at_the_next_sync_and_leaves_the_distances_as_they_were():
    comebacks = RestartBackoff(["a", "b"])
    attempts = []
    for sync in range(16):
        if comebacks.due(["a"]):
            attempts.append(sync)
            if sync in (2, 3, 4):
                comebacks.do_not_count("a")
    assert attempts == [0, 2, 3, 4, 5, 9]


def test_when_none_serves_all_are_tried_and_a_server_that_serves_never_is():
    comebacks = RestartBackoff(["a", "b"])
    assert [comebacks.due(["a"]), comebacks.due(["a"]), comebacks.due(["b", "a"])] == [["a"], [], ["a", "b"]]
    assert comebacks.due([]) == []
