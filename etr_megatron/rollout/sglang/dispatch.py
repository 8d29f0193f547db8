"""Decides which waiting request goes to which server next.

A request goes to a server that has its prompt cached, as long as that server is not overloaded:

1. A server's share is the number of requests, in flight or waiting, divided by the number of servers.
2. The homes of a prompt are the servers that have requests of it. A prompt's requests go to its homes until these are an eighth
   above their share. Further requests go to the least busy server if it is below its share; it becomes another home.
3. A further turn of a dialogue goes to the server that drew the previous turn, until that server is half above its share. The
   limit is higher because more tokens would have to be computed again.

A prompt may kill every server that it is sent to. The rules below limit the loss to two servers. If it kills only after a
while, the loss is the servers that have it by then, and two more.

1. A prompt has one home until it is proved harmless: a response to it is complete, or its home has had it for a while and still
   generates. So a prompt that kills its home kills no other server.
2. All prompts in flight at a server that died are suspect, because it is not known which of them killed it.
3. A suspect prompt is tested before its requests are sent anywhere again. One prompt is tested at a time, at a server that has
   no other requests and is not the one that died. The last server is not used for tests if others can come back. If the server
   dies in the test, the prompt is to blame. If not, another prompt or the server itself was. A prompt that passed has one home
   until a response to it is complete.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

_HOME_DIVISOR, _DIALOGUE_DIVISOR = 8, 2
"""For a request whose prompt is cached there a server may be 1/8 above its share, for a cached dialogue 1/2. One more request
slows down every decoding step of the server; a prefill elsewhere interrupts decoding once, and is long only for a dialogue."""


def most_where_cached(share: int, *, is_dialogue: bool) -> int:
    """Most requests in flight, with the next one, where the next one's prompt or dialogue is cached. share: requests for each
    such place, rounded up."""
    return share + (max(1, share // _DIALOGUE_DIVISOR) if is_dialogue else share // _HOME_DIVISOR)


class Order(NamedTuple):
    """A request to send to a server. is_test: only the prompt is tested, and the request itself keeps waiting."""

    key: int
    server: str
    is_test: bool


class _Lane(NamedTuple):
    """Key of a queue: requests of a prompt that wait for the same servers. cached_at: the server that has their dialogues
    cached; "" if they wait for the prompt's homes."""

    prompt: str
    cached_at: str


class Dispatch:
    """The requests of a fleet by key, waiting or in flight, and the suspect prompts.

    concurrency: most requests in flight per server. deaths: prompt -> number of servers that died with it in flight since the
    last complete response to it; prompts that have deaths at the start are suspect.
    """

    def __init__(self, concurrency: int, deaths: Mapping[str, int]) -> None:
        self._concurrency = concurrency
        self._prompts: dict[int, str] = {}  # of all requests
        self._counts: Counter[str] = Counter()  # by prompt: all its requests
        self._cached_at: dict[int, str] = {}  # of requests that continue a dialogue: the server that has it cached
        self._waiting: deque[int] = deque()
        self._lanes: dict[_Lane, deque[int]] = {}
        self._lanes_at: dict[str, dict[_Lane, None]] = {}  # by server: the lanes that wait for it
        self._held: dict[str, deque[int]] = {}  # by suspect prompt: its requests, which may not start
        self._homes: dict[str, dict[str, int]] = {}  # by prompt and server: number of requests in flight
        self._servers: dict[int, str] = {}  # of requests in flight
        self._load: Counter[str] = Counter()
        self._harmless: set[str] = set()
        self._suspects = dict.fromkeys(deaths, "")  # prompt -> the server that died with it
        self._testing: tuple[str, str] | None = None  # prompt and server
        self.deaths = dict(deaths)
        self.apart: str | None = None
        """The server reserved for tests."""
        self.unproved: list[str] = []
        """Prompts that the last call of `next` would have given another home if they had been proved harmless."""

    @property
    def waits(self) -> bool:
        """Whether any request waits."""
        return bool(self._waiting or self._lanes or self._held)

    def add(self, key: int, prompt: str, *, first: bool = False, cached_at: str = "") -> None:
        """Add a request. first: ahead of all others. cached_at: if it continues a dialogue, the server that generated it."""
        self._prompts[key] = prompt
        self._counts[prompt] += 1
        if cached_at:
            self._cached_at[key] = cached_at
            self.mark_harmless(prompt)  # a complete turn of it exists
        self._wait([key], first=first)

    def next(self, serving: Sequence[str], *, spare_last: bool, routed: bool) -> Order | None:
        """The next request to start at one of these servers; None if there is none. It counts as started from now on.

        spare_last: test nothing at the only server. routed: there is a router, so a request other than a test may be at another
        server than the one it is counted for. Then a server counts as idle only when no request is in flight anywhere, and a
        prompt has one home.
        """
        self.unproved = []
        if (test := self._next_test(serving, spare_last=spare_last, routed=routed)) is not None:
            return test
        usable = {name: None for name in serving if name != self.apart}
        free = [name for name in usable if self._load[name] < self._concurrency]
        if not free:
            return None
        self._leave_lost(usable)
        self._set_dialogues_aside(usable)
        share = self._concurrency if routed else self._share(len(usable))
        order = self._next_set_aside(free, share) or self._next_waiting(usable, free, share)
        return self._next_elsewhere(free, share) if order is None and not routed else order

    def move(self, key: int, servers: Iterable[str]) -> str:
        """Count a request in flight at the least busy of these servers from now on; returns that server."""
        left, server = self._servers[key], min(servers, key=self._load.__getitem__)
        self._arrive(key, server)
        self._leave(key, left)
        return server

    def ended(self, key: int) -> None:
        """The request is no longer in flight; call `again` or `forget` next."""
        self._leave(key, self._servers.pop(key))

    def again(self, key: int) -> None:
        """Let the request wait again, ahead of all others."""
        self._wait([key], first=True)

    def forget(self, key: int) -> None:
        """Drop a request that is not waiting: it was answered, or its response is no longer needed."""
        prompt = self._prompts.pop(key)
        self._cached_at.pop(key, None)
        self._counts[prompt] -= 1
        if not self._counts[prompt]:
            del self._counts[prompt]
            self._harmless.discard(prompt)

    def withdraw(self, keys: Iterable[int]) -> None:
        """Drop those of these requests that have not started."""
        gone = set(keys)
        self._waiting = deque(key for key in self._waiting if key not in gone)
        for prompt in [prompt for prompt, held in self._held.items() if not gone.isdisjoint(held)]:
            self._hold(prompt, [key for key in self._held.pop(prompt) if key not in gone])
        for lane in [lane for lane, aside in self._lanes.items() if not gone.isdisjoint(aside)]:
            left = [key for key in self._pop_lane(lane) if key not in gone]
            self._wait(left, first=True)
        for key in gone - self._servers.keys():
            if key in self._prompts:
                self.forget(key)

    def suspect(self, prompt: str, server: str) -> None:
        """Record that a server (its name, or "" if unknown) died with this prompt in flight. Repeated calls, one for each of
        the prompt's requests there, count as one death."""
        if prompt not in self._suspects:
            self.deaths[prompt] = self.deaths.get(prompt, 0) + 1
            self._suspects[prompt] = server
            self._hold(prompt, [key for key in self._waiting if self._prompts[key] == prompt])
            self._waiting = deque(key for key in self._waiting if self._prompts[key] != prompt)
            for lane in [lane for lane in self._lanes if lane.prompt == prompt]:
                self._hold(prompt, self._pop_lane(lane))

    def end_test(self, *, survived: bool | None) -> list[int]:
        """End the current test. survived: whether the server is alive; None if the test was cut off or did not reach it.

        Returns the requests of a prompt that killed the server. They are dropped unless they are in flight.
        """
        assert self._testing is not None
        (prompt, server), self._testing = self._testing, None
        self._load[server] -= 1
        if survived is None:
            return []
        self._suspects.pop(prompt, None)
        if survived:
            self._wait(self._held.pop(prompt, ()), first=True)
            return []
        self.deaths.pop(prompt, None)
        gone = [key for key, of in self._prompts.items() if of == prompt]
        self.withdraw(gone)
        return gone

    def clear_of_suspicion(self, prompt: str) -> None:
        """A response to the prompt is complete: forget its deaths, unless it has become suspect meanwhile."""
        if prompt not in self._suspects:
            self.deaths.pop(prompt, None)
            self.mark_harmless(prompt)

    def mark_harmless(self, prompt: str) -> None:
        """Let the prompt have several homes, unless a server has died with it since the last complete response to it. Forgotten
        when the prompt's last request ends."""
        if prompt in self._counts and prompt not in self.deaths:
            self._harmless.add(prompt)

    def clear(self) -> None:
        """Drop all requests; none of them may be in flight. Suspicions are kept."""
        for some in (self._prompts, self._counts, self._cached_at, self._lanes, self._lanes_at, self._held):
            some.clear()
        self._waiting.clear()
        self._harmless.clear()
        self.apart, self.unproved = None, []

    def _next_test(self, serving: Sequence[str], *, spare_last: bool, routed: bool) -> Order | None:
        if self._testing is not None:
            return None
        if not self._held or (spare_last and len(serving) == 1):
            self.apart = None
            return None
        idle = [name for name in serving if not (self._load.total() if routed else self._load[name])]
        if self.apart is not None and self.apart in serving:  # reserved, so it gets nothing but tests
            idle = [self.apart, *idle]
        for name in idle:
            for prompt in self._held:
                # The prompt's other requests at the dead server must have ended first, or their end would count as another
                # death. Its requests at other servers may go on: they began before the prompt was suspect.
                is_back = all(home in serving and not routed for home in self._homes.get(prompt, ()))
                if is_back and (self._suspects[prompt] != name or len(serving) == 1):
                    self.apart = name
                    self._load[name] += 1
                    self._testing = prompt, name
                    return Order(self._held[prompt][0], name, True)
        self.apart = None
        return None

    def _share(self, servers: int) -> int:
        """Number of requests per server, rounded up, for this number of servers. Held requests do not count."""
        return -(-(len(self._prompts) - sum(map(len, self._held.values()))) // servers)

    def _has_place(self, server: str, lane: _Lane, share: int) -> bool:
        """Whether a server that has the prompt or dialogues of this lane cached takes another of its requests."""
        return self._load[server] < most_where_cached(share, is_dialogue=bool(lane.cached_at))

    def _may_have(self, server: str, prompt: str) -> bool:
        homes = self._homes.get(prompt)
        return not homes or server in homes or self._may_spread(prompt)

    def _may_spread(self, prompt: str) -> bool:
        return prompt in self._harmless and prompt not in self.deaths

    def _next_set_aside(self, free: Sequence[str], share: int) -> Order | None:
        """A request that was set aside for a server that now has a place for it."""
        for name in free:
            for lane in sorted(self._lanes_at.get(name, ()), key=lambda lane: not lane.cached_at):  # dialogues first
                if self._has_place(name, lane, share) and self._may_have(name, lane.prompt):
                    return self._begin(self._from_lane(lane), name)
        return None

    def _set_dialogues_aside(self, usable: Collection[str]) -> None:
        """Set dialogues at the head of the queue aside for their servers, ahead of other requests for these servers."""
        while self._waiting and (lane := self._lane_of(self._waiting[0], usable)).cached_at:
            self._set_aside(self._waiting.popleft(), lane)

    def _lane_of(self, key: int, usable: Collection[str]) -> _Lane:
        prompt, cached_at = self._prompts[key], self._cached_at.get(key, "")
        return _Lane(prompt, cached_at if cached_at in usable and self._may_have(cached_at, prompt) else "")

    def _next_waiting(self, usable: Collection[str], free: Sequence[str], share: int) -> Order | None:
        """The first waiting request whose servers have a place for it. Requests before it are set aside."""
        while self._waiting:
            key = self._waiting.popleft()
            lane = self._lane_of(key, usable)
            wanted = self._servers_of(lane)
            places = [name for name in free if not wanted or (name in wanted and self._has_place(name, lane, share))]
            if places:
                return self._begin(key, min(places, key=self._load.__getitem__))
            self._set_aside(key, lane)
        return None

    def _next_elsewhere(self, free: Sequence[str], share: int) -> Order | None:
        """A request that has no place at its own servers, for another server that is below its share."""
        server = min(free, key=self._load.__getitem__)
        if self._load[server] >= share:
            return None
        for lane in self._lanes:
            if self._may_have(server, lane.prompt):
                return self._begin(self._from_lane(lane), server)
        self.unproved = [prompt for prompt in dict.fromkeys(lane.prompt for lane in self._lanes) if prompt not in self.deaths]
        return None

    def _begin(self, key: int, server: str) -> Order:
        self._arrive(key, server)
        return Order(key, server, False)

    def _arrive(self, key: int, server: str) -> None:
        prompt = self._prompts[key]
        homes = self._homes.setdefault(prompt, {})
        homes[server] = homes.get(server, 0) + 1
        if (lane := _Lane(prompt, "")) in self._lanes:
            self._lanes_at.setdefault(server, {})[lane] = None
        self._load[server] += 1
        self._servers[key] = server

    def _leave(self, key: int, server: str) -> None:
        """Record that the request is not at this server any more."""
        self._load[server] -= 1
        prompt = self._prompts[key]
        homes, lane = self._homes[prompt], _Lane(prompt, "")
        homes[server] -= 1
        if not homes[server]:
            del homes[server]
            self._lanes_at.get(server, {}).pop(lane, None)
        if not homes:
            del self._homes[prompt]
            self._wait(self._pop_lane(lane), first=True)

    def _leave_lost(self, usable: Collection[str]) -> None:
        """Put dialogues back into the queue if the server that they wait for is not in use any more."""
        for name in [name for name in self._lanes_at if name not in usable]:
            for lane in [lane for lane in self._lanes_at[name] if lane.cached_at]:
                self._wait(self._pop_lane(lane), first=True)

    def _wait(self, keys: Iterable[int], *, first: bool) -> None:
        keys = list(keys)
        if keys and self._prompts[keys[0]] in self._suspects:
            self._hold(self._prompts[keys[0]], keys)
        elif first:
            self._waiting.extendleft(reversed(keys))
        else:
            self._waiting.extend(keys)

    def _hold(self, prompt: str, keys: Collection[int]) -> None:
        if keys:
            self._held.setdefault(prompt, deque()).extend(keys)

    def _servers_of(self, lane: _Lane) -> Collection[str]:
        return (lane.cached_at,) if lane.cached_at else self._homes.get(lane.prompt, ())

    def _set_aside(self, key: int, lane: _Lane) -> None:
        self._lanes.setdefault(lane, deque()).append(key)
        for name in self._servers_of(lane):
            self._lanes_at.setdefault(name, {})[lane] = None

    def _from_lane(self, lane: _Lane) -> int:
        key = self._lanes[lane].popleft()
        if not self._lanes[lane]:
            self._pop_lane(lane)
        return key

    def _pop_lane(self, lane: _Lane) -> deque[int]:
        """Remove the lane; returns its requests."""
        for name in self._servers_of(lane):
            self._lanes_at.get(name, {}).pop(lane, None)
        return self._lanes.pop(lane, deque())
