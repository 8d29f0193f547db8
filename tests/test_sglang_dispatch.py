"""Which request goes to which server, and what is tested where after a server has died; runs without servers."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from etr_megatron.rollout.sglang.dispatch import Dispatch, Order

SERVERS = ["a", "b", "c"]


def begin(dispatch: Dispatch, servers=SERVERS, *, spare_last=False, routed=False) -> list[Order]:
    """All orders that start now."""
    found = []
    while (order := dispatch.next(servers, spare_last=spare_last, routed=routed)) is not None:
        found.append(order)
    return found


def dispatch_of(prompts: str, concurrency: int = 2, deaths=None) -> Dispatch:
    """One request per letter, keys from 0."""
    found = Dispatch(concurrency, deaths or {})
    for key, prompt in enumerate(prompts):
        found.add(key, prompt)
    return found


def dies(dispatch: Dispatch, server: str, *orders: Order) -> None:
    """The server dies with these under way, which end one after the other."""
    for order in orders:
        dispatch.suspect("pqrstu"[order.key], server)
        dispatch.ended(order.key)
        dispatch.again(order.key)


def test_requests_go_where_least_is_under_way_in_their_order():
    assert begin(dispatch_of("pqrstuvw")) == [Order(key, SERVERS[key % 3], False) for key in range(6)]


def test_all_of_a_prompt_is_at_one_server_and_what_has_no_room_there_waits_for_it():
    dispatch = dispatch_of("ppppq")
    assert [order[:2] for order in begin(dispatch)] == [(0, "a"), (1, "a"), (4, "b")]
    dispatch.ended(0)
    dispatch.forget(0)
    assert [order[:2] for order in begin(dispatch)] == [(2, "a")]
    assert begin(dispatch, ["b", "c"]) == []  # its server has failed, perhaps because of it
    for key in (1, 2):
        dispatch.ended(key)
        dispatch.forget(key)
    assert [order[:2] for order in begin(dispatch, ["b", "c"])] == [(3, "c")]
    assert not dispatch.waits


def test_what_was_at_a_server_that_died_is_tested_one_by_one_and_alone_elsewhere():
    dispatch = dispatch_of("pqrstu")
    orders = begin(dispatch)
    dies(dispatch, "a", orders[0], orders[3])
    assert begin(dispatch, ["b", "c"]) == []  # no server is idle
    for key in (1, 4):
        dispatch.ended(key)
        dispatch.forget(key)
    assert begin(dispatch, ["b", "c"]) == [Order(0, "b", True)]
    dispatch.add(6, "v")
    assert begin(dispatch, ["b", "c"]) == []  # c is full, b is reserved for tests
    assert dispatch.end_test(survived=True) == []
    assert begin(dispatch, ["b", "c"]) == [Order(3, "b", True)]
    assert dispatch.end_test(survived=False) == [3]
    # The prompt that survived its test, and the one added later, go to the remaining server.
    dispatch.ended(2)
    dispatch.forget(2)
    assert begin(dispatch, ["c"]) == [Order(0, "c", False)]
    assert dispatch.deaths == {"p": 1}
    dispatch.ended(0)
    dispatch.clear_of_suspicion("p")
    assert dispatch.deaths == {}


def test_a_test_that_was_cut_off_is_made_again():
    dispatch = dispatch_of("pq", deaths={"q": 1})
    assert begin(dispatch) == [Order(1, "a", True), Order(0, "b", False)]
    assert dispatch.end_test(survived=None) == []
    assert begin(dispatch) == [Order(1, "a", True)]


def test_nothing_is_tested_at_the_last_server_where_others_can_come_back():
    dispatch = dispatch_of("p", deaths={"p": 1})
    assert begin(dispatch, ["a"], spare_last=True) == [] and dispatch.waits
    assert begin(dispatch, ["a"]) == [Order(0, "a", True)]


def test_a_prompt_is_not_tested_at_the_server_that_died_with_it_unless_that_is_the_only_one():
    for servers, where in ((["a", "b"], "b"), (["a"], "a")):
        dispatch = dispatch_of("p")
        dies(dispatch, "a", *begin(dispatch, ["a"]))
        assert begin(dispatch, servers) == [Order(0, where, True)]


def test_a_prompt_is_tested_when_all_of_it_is_back_from_the_server_that_died_and_that_death_counts_once():
    dispatch = dispatch_of("pp")
    begin(dispatch, ["a"])
    dies(dispatch, "a", Order(0, "a", False))
    assert begin(dispatch, ["b", "c"]) == []
    dispatch.suspect("p", "a")
    dispatch.ended(1)
    dispatch.again(1)
    assert begin(dispatch, ["b", "c"]) == [Order(0, "b", True)] and dispatch.deaths == {"p": 1}


def test_behind_a_router_no_server_is_idle_before_all_are():
    dispatch = dispatch_of("pqr", deaths={"r": 1})
    assert begin(dispatch, routed=True) == [Order(2, "a", True), Order(0, "b", False), Order(1, "c", False)]
    dispatch.end_test(survived=None)
    assert begin(dispatch, routed=True) == [Order(2, "a", True)]  # a has had only tests
    dispatch.end_test(survived=None)
    assert begin(dispatch, ["b", "c"], routed=True) == []
    for key in (0, 1):
        dispatch.ended(key)
        dispatch.forget(key)
    assert begin(dispatch, ["b", "c"], routed=True) == [Order(2, "b", True)]


def test_what_is_withdrawn_does_not_wait_any_more():
    dispatch = dispatch_of("ppppq", deaths={"q": 1})
    dispatch.withdraw([1, 3, 4])
    assert [order.key for order in begin(dispatch)] == [0, 2] and not dispatch.waits


@pytest.mark.parametrize("seed", range(30))
def test_whatever_servers_die_of_each_request_is_answered_or_its_prompt_is_lethal(seed):
    """Fleets of various sizes, lethal prompts, servers that die by themselves and come back when only one is left."""
    rng = random.Random(seed)
    servers = [f"s{number}" for number in range(rng.randint(2, 6))]
    prompts = [f"p{number}" for number in range(rng.randint(1, 20))]
    lethal = set(rng.sample(prompts, min(len(prompts), rng.randint(0, 2))))
    dispatch, left = Dispatch(rng.randint(1, 5), {}), {}
    for key in range(rng.randint(1, 80)):
        left[key] = rng.choice(prompts)
        dispatch.add(key, left[key])
    serving, under_way, answered, given_up, killed = list(servers), {}, [], [], Counter()
    while left:
        spare_last = len(serving) < len(servers)
        for order in begin(dispatch, serving, spare_last=spare_last):
            others = [one.key for one in under_way.values() if one.server == order.server]
            assert not order.is_test or not others
            assert all(one.server == order.server for one in under_way.values() if left[one.key] == left[order.key])
            under_way[order.key, order.is_test] = order
        assert under_way or spare_last
        if not under_way:  # a weight sync
            serving = list(servers)
            continue
        order = rng.choice(list(under_way.values()))
        is_lethal = left[order.key] in lethal
        if is_lethal or (not order.is_test and len(serving) > 1 and rng.random() < 0.03):
            killed[left[order.key]] += is_lethal
            serving.remove(order.server)
            if order.is_test:
                del under_way[order.key, True]
                gone = dispatch.end_test(survived=False)
                given_up += [(key, left.pop(key)) for key in gone]
                continue
            for key, is_test in [at for at, one in under_way.items() if one.server == order.server]:
                del under_way[key, is_test]
                dispatch.suspect(left[key], order.server)
                dispatch.ended(key)
                dispatch.again(key)
        elif order.is_test:
            del under_way[order.key, True]
            assert dispatch.end_test(survived=True) == []
        else:
            del under_way[order.key, False]
            dispatch.clear_of_suspicion(left[order.key])
            dispatch.ended(order.key)
            dispatch.forget(order.key)
            answered.append(left.pop(order.key))
    assert {prompt for _, prompt in given_up} <= lethal and not lethal & set(answered)
    assert max(killed.values(), default=0) <= 2 and not dispatch.waits
