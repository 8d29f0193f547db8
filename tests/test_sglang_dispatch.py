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


def end(dispatch: Dispatch, key: int) -> None:
    """The request is answered."""
    prompt = dispatch._prompts[key]
    dispatch.ended(key)
    dispatch.forget(key)
    dispatch.clear_of_suspicion(prompt)


def test_requests_go_where_least_is_under_way_in_their_order():
    assert begin(dispatch_of("pqrstuvw")) == [Order(key, SERVERS[key % 3], False) for key in range(6)]


def test_all_of_a_prompt_not_known_to_be_harmless_is_at_one_server_and_what_has_no_room_there_waits_for_it():
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
    assert [order.key for order in begin(dispatch, ["a"])] == [0, 2] and not dispatch.waits


def test_what_a_fleet_has_little_of_is_spread_over_it_once_its_prompt_is_known_to_be_harmless():
    dispatch, servers = dispatch_of("p" * 16, 64), ["a", "b", "c", "d"]
    assert Counter(order.server for order in begin(dispatch, servers)) == {"a": 4}
    assert dispatch.unproved == ["p"] and dispatch.waits
    dispatch.mark_harmless("p")
    assert Counter(order.server for order in begin(dispatch, servers)) == {"b": 4, "c": 4, "d": 4}
    assert dispatch.unproved == [] and not dispatch.waits


def test_with_fewer_prompts_than_servers_all_have_the_same_and_a_prompt_has_no_more_homes_than_it_takes():
    dispatch, servers = dispatch_of("".join(prompt * 16 for prompt in "pqr"), 64), [f"s{number}" for number in range(6)]
    found = begin(dispatch, servers)
    for prompt in "pqr":
        dispatch.mark_harmless(prompt)
    found += begin(dispatch, servers)
    homes = Counter(("pqr"[order.key // 16], order.server) for order in found)
    assert len(found) == 48 and len(homes) == 6  # two each
    assert set(homes.values()) == {7, 9}  # a share of 8 and an eighth above it


def test_where_all_have_their_share_each_prompt_stays_at_its_server():
    prompts, servers = [chr(200 + number) for number in range(32)], [f"s{number}" for number in range(8)]
    dispatch = dispatch_of("".join(prompt * 16 for prompt in prompts), 128)
    for prompt in prompts:
        dispatch.mark_harmless(prompt)
    found = begin(dispatch, servers)
    assert len({(order.key // 16, order.server) for order in found}) == 32
    assert Counter(order.server for order in found) == dict.fromkeys(servers, 64)
    # One prompt ends early. The others' requests are under way, and a new prompt takes the free places.
    for key in range(16):
        end(dispatch, key)
    for key in range(16):
        dispatch.add(1000 + key, "new")
    assert {order.server for order in begin(dispatch, servers)} == {found[0].server}


def test_a_free_place_is_not_left_to_a_prompt_whose_homes_are_full():
    dispatch = dispatch_of("ppppppqq", 3)
    dispatch.mark_harmless("p")
    assert [order[:2] for order in begin(dispatch, ["a", "b"])] == [(0, "a"), (1, "a"), (2, "a"), (6, "b"), (7, "b"), (3, "b")]
    end(dispatch, 0)
    end(dispatch, 6)
    assert [order[:2] for order in begin(dispatch, ["a", "b"])] == [(4, "a"), (5, "b")]


def test_a_further_turn_goes_to_the_server_that_drew_the_one_before_unless_that_is_half_above_its_share():
    dispatch = dispatch_of("pqrs", 8)
    assert [order.server for order in begin(dispatch)] == ["a", "b", "c", "a"]
    end(dispatch, 0)
    end(dispatch, 1)
    dispatch.add(4, "p", cached_at="a")  # the least busy one is b
    assert begin(dispatch) == [Order(4, "a", False)]
    dispatch.add(5, "q", cached_at="a")  # a has two where there are four requests at three servers
    assert begin(dispatch) == [Order(5, "a", False)]
    dispatch.add(6, "t", cached_at="a")  # three where there are five
    assert begin(dispatch) == [Order(6, "b", False)]
    dispatch.add(7, "u", cached_at="gone")
    assert begin(dispatch) == [Order(7, "b", False)]


def test_a_further_turn_waits_for_its_server_while_others_have_something_to_do_without_it():
    dispatch = dispatch_of("pqrs", 2)
    assert [order.server for order in begin(dispatch, ["a", "b"])] == ["a", "b", "a", "b"]
    for key, prompt in enumerate("tuvw", 4):
        dispatch.add(key, prompt)
    dispatch.add(8, "x", first=True, cached_at="a")
    end(dispatch, 1)
    assert begin(dispatch, ["a", "b"]) == [Order(4, "b", False)]
    end(dispatch, 0)
    assert begin(dispatch, ["a", "b"]) == [Order(8, "a", False)]


def test_a_further_turn_does_not_wait_for_a_server_that_is_lost_meanwhile():
    dispatch = dispatch_of("pq", 1)
    begin(dispatch, ["a", "b"])
    for key, prompt in enumerate("rs", 2):
        dispatch.add(key, prompt, cached_at="a")
    assert begin(dispatch, ["a", "b"]) == []
    end(dispatch, 1)
    assert begin(dispatch, ["b"]) == [Order(2, "b", False)]
    end(dispatch, 2)
    assert begin(dispatch, ["b"]) == [Order(3, "b", False)] and not dispatch.waits


def test_a_prompt_that_a_server_died_with_is_at_one_server_at_a_time_until_it_is_answered():
    dispatch, servers = dispatch_of("pppp", 8), ["a", "b"]
    dispatch.mark_harmless("p")
    assert [order.server for order in begin(dispatch, servers)] == ["a", "a", "b", "b"]
    for key in (0, 1):
        dispatch.suspect("p", "a")
        dispatch.ended(key)
        dispatch.again(key)
    # Those at b go on, and do not keep the others from being tested.
    assert begin(dispatch, ["b", "c", "d"]) == [Order(0, "c", True)]
    assert dispatch.end_test(survived=True) == [] and dispatch.deaths == {"p": 1}
    dispatch.mark_harmless("p")  # not while its death is not explained
    assert [order[:2] for order in begin(dispatch, ["b", "c", "d"])] == [] and dispatch.unproved == []
    end(dispatch, 2)
    assert {order.server for order in begin(dispatch, ["b", "c", "d"])} == {"c", "d"} and dispatch.deaths == {}


def test_behind_a_router_a_prompt_has_one_home_whatever_its_share():
    dispatch = dispatch_of("ppppp", 4)
    dispatch.mark_harmless("p")
    assert [order.server for order in begin(dispatch, routed=True)] == ["a"] * 4 and dispatch.waits


def test_nothing_is_remembered_of_requests_that_have_ended():
    dispatch, servers = dispatch_of("p" * 9 + "qr", 2), ["a", "b"]
    dispatch.mark_harmless("p")
    for key in range(20, 24):
        dispatch.add(key, "q", cached_at="b", first=True)
    dispatch.withdraw([8, 23])
    orders = begin(dispatch, servers)
    while orders:
        end(dispatch, orders.pop(0).key)
        orders += begin(dispatch, servers)
    assert not dispatch.waits
    left = {name: value for name, value in vars(dispatch).items() if name not in ("_concurrency", "_load", "_lanes_at")}
    assert not any(left.values()), left
    assert not any(dispatch._lanes_at.values()) and not dispatch._load.total()


def test_a_request_that_waits_when_its_prompt_falls_under_suspicion_is_tested_next():
    dispatch = dispatch_of("pp", concurrency=1)
    (order,) = begin(dispatch, ["a"])
    dispatch.ended(order.key)
    dispatch.suspect("p", "a")
    dispatch.forget(order.key)  # nobody waits for it any more
    assert begin(dispatch, ["b"]) == [Order(1, "b", True)]


def test_dialogues_come_before_other_requests_that_wait_for_the_server():
    dispatch = dispatch_of("pppqqq")
    assert [order[:2] for order in begin(dispatch, ["a", "b"])] == [(0, "a"), (1, "a"), (3, "b"), (4, "b")]
    dispatch.add(6, "r", first=True, cached_at="a")
    assert begin(dispatch, ["a", "b"]) == []
    end(dispatch, 0)
    assert dispatch.next(["a", "b"], spare_last=False, routed=False) == Order(6, "a", False)


def test_dialogues_of_a_group_that_all_had_a_turn_go_on_at_their_servers():
    dispatch = dispatch_of("pppppppp", concurrency=4)
    first = begin(dispatch, ["a", "b"])
    dispatch.mark_harmless("p")
    orders = first + begin(dispatch, ["a", "b"])
    assert Counter(order.server for order in orders) == {"a": 4, "b": 4}
    for order in orders:
        end(dispatch, order.key)
    for order in orders:
        dispatch.add(8 + order.key, "p", cached_at=order.server)
    assert {order.key - 8: order.server for order in begin(dispatch, ["a", "b"])} == {one.key: one.server for one in orders}


class RandomFleet:
    """A fleet of random size with lethal prompts and servers that also die by themselves; all come back when nothing can go on.

    late: lethal prompts seem harmless at first, and a test to a prompt's first tokens does not find them. left: prompts by key
    of requests that are not ended. killed: by lethal prompt, its servers. homes: by prompt, the most that had it at once.
    """

    def __init__(self, seed: int, late: bool) -> None:
        self.rng, self.late = random.Random(seed), late
        self.servers = [f"s{number}" for number in range(self.rng.randint(2, 6))]
        prompts = [f"p{number}" for number in range(self.rng.randint(1, 20))]
        self.lethal = set(self.rng.sample(prompts, min(len(prompts), self.rng.randint(0, 2))))
        self.dispatch, self.left = Dispatch(self.rng.randint(1, 5), {}), {}
        self.serving, self.under_way = list(self.servers), {}
        self.answered, self.given_up = [], []
        self.killed, self.harmless, self.homes = Counter(), set(), Counter()
        for key in range(self.rng.randint(1, 80)):
            self.add(key, self.rng.choice(prompts), self.rng.choice(["", *self.servers]))

    def add(self, key: int, prompt: str, cached_at: str) -> None:
        """Of a prompt that kills at once, no turn was ever complete."""
        may_go_on = self.late or prompt not in self.lethal
        self.left[key] = prompt
        self.dispatch.add(key, prompt, cached_at=cached_at if may_go_on else "")
        if cached_at and may_go_on:
            self.harmless.add(prompt)

    def go_on(self) -> None:
        """Start what can start, then let one request end, whichever way."""
        spare_last = len(self.serving) < len(self.servers)
        self.start(spare_last=spare_last)
        assert self.under_way or spare_last
        if not self.under_way:  # a weight sync
            self.serving = list(self.servers)
            return
        order = self.rng.choice(list(self.under_way.values()))
        if order.key not in self.left:  # it was cut off
            self.drop(order)
            return
        prompt = self.left[order.key]
        kills = prompt in self.lethal and not (self.late and order.is_test and self.dispatch.deaths[prompt] == 1)
        if kills or (not order.is_test and len(self.serving) > 1 and self.rng.random() < 0.03):
            self.killed[prompt] += kills
            self.die(order)
        elif order.is_test:
            del self.under_way[order.key, True]
            assert self.dispatch.end_test(survived=True) == []
        else:
            self.drop(order)
            self.dispatch.clear_of_suspicion(prompt)
            self.harmless.add(prompt)
            self.answered.append(self.left.pop(order.key))

    def start(self, *, spare_last: bool) -> None:
        orders = begin(self.dispatch, self.serving, spare_last=spare_last)
        for prompt in self.dispatch.unproved:
            if (self.late or prompt not in self.lethal) and self.rng.random() < 0.5:
                self.harmless.add(prompt)
                self.dispatch.mark_harmless(prompt)
        for order in [*orders, *begin(self.dispatch, self.serving, spare_last=spare_last)]:
            assert not order.is_test or not any(one.server == order.server for one in self.under_way.values())
            prompt = self.left[order.key]
            at = {one.server for one in self.under_way.values() if self.left.get(one.key) == prompt} | {order.server}
            assert len(at) == 1 or prompt in self.harmless or order.is_test
            self.homes[prompt] = max(self.homes[prompt], len(at))
            self.under_way[order.key, order.is_test] = order

    def drop(self, order: Order) -> None:
        del self.under_way[order.key, False]
        self.dispatch.ended(order.key)
        self.dispatch.forget(order.key)

    def die(self, order: Order) -> None:
        """The order's server dies; of a tested prompt, nothing is asked for again."""
        self.serving.remove(order.server)
        if order.is_test:
            del self.under_way[order.key, True]
            self.given_up += [(key, self.left.pop(key)) for key in self.dispatch.end_test(survived=False)]
            return
        for one in [one for one in self.under_way.values() if one.server == order.server]:
            if one.key not in self.left:
                self.drop(one)
                continue
            del self.under_way[one.key, False]
            self.harmless.discard(self.left[one.key])
            self.dispatch.suspect(self.left[one.key], order.server)
            self.dispatch.ended(one.key)
            self.dispatch.again(one.key)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("seed", range(30))
def test_whatever_servers_die_of_each_request_is_answered_or_its_prompt_is_lethal(seed, late):
    fleet = RandomFleet(seed, late)
    while fleet.left:
        fleet.go_on()
    assert {prompt for _, prompt in fleet.given_up} <= fleet.lethal and not fleet.lethal & set(fleet.answered)
    assert all(count <= (fleet.homes[prompt] + 2 if late else 2) for prompt, count in fleet.killed.items())
    assert not fleet.dispatch.waits
