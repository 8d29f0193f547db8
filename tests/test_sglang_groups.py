"""Which attention group of a server gets a request."""

from __future__ import annotations

from collections import Counter

from etr_megatron.rollout.sglang.groups import AttentionGroups


def test_the_responses_to_a_prompt_share_a_group_until_that_is_an_eighth_above_its_share():
    groups = AttentionGroups()
    found = [groups.enter("a", 4, prompt, share=64) for prompt in "pqrs" * 15 + "pppp"]
    assert Counter(zip("pqrs" * 15, found, strict=False)) == dict.fromkeys([("p", 0), ("q", 1), ("r", 2), ("s", 3)], 15)
    assert found[60:] == [0, 0, 0, 1]  # 18 of 16, then the least busy ones
    assert [groups.enter("b", 4, "p", share=1) for _ in range(5)] == [0, 1, 2, 3, 0]  # another server has groups of its own
    assert groups.enter("c", 1, "p", share=64) is None


def test_a_further_turn_goes_to_the_group_that_drew_the_one_before_unless_that_is_half_above_its_share():
    groups = AttentionGroups()
    assert [groups.enter("a", 3, f"p{number}", share=12, cached_in=2) for number in range(8)] == [2] * 6 + [0, 1]
    for number in range(6):
        groups.leave("a", f"p{number}", 2)
    assert groups.enter("a", 3, "p6", share=12) == 0  # where this prompt has a request
    assert groups.enter("a", 2, "p7", share=12, cached_in=2) == 1  # the server was started again with fewer groups


def test_of_idle_groups_the_one_that_has_had_the_fewest_requests_is_next():
    groups, found = AttentionGroups(), []
    for number in range(5):
        found.append(groups.enter("a", 3, f"p{number}", share=1))
        groups.leave("a", f"p{number}", found[-1])
    assert found == [0, 1, 2, 0, 1]
