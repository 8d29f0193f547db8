"""Decides which waiting request goes to which server next.

Requests go where their prompt is cached, as long as that server is not above its share:

1. A server's share is the number of requests, under way or waiting, divided by the number of servers.
2. A prompt's requests go to its homes, the servers that have requests of it, until these are an eighth above their share. What
   has no place there goes to the least busy server, which becomes another home, if that is below its share.
3. A further turn of a dialogue goes to the server that drew the one before, until that is half above its share: there is more
   to compute anew.

A prompt that kills every server that it comes to costs two of them, or as many as it was at and two more if it kills only after
a while.

1. A prompt has one home until it has proved harmless: a response to it is complete, or its home has had it for a while and
   still generates. If it kills its home, it kills no other.
2. All prompts under way at a server that died are suspect, as it is not known which of them killed it.
3. A suspect prompt is tested before its requests go anywhere again: one prompt at a time, at a server that has nothing else and
   is not the one that died with it. The last server is spared if others can come back. If the server dies, it was the prompt;
   if not, it was another prompt or a fault of the server itself. Until a response to it is complete, it has one home.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

_HOME_DIVISOR, _DIALOGUE_DIVISOR = 8, 2
"""A server may be one eighth above its share for what has a prompt cached there, and half for what has a dialogue. A request
more slows down every step of decoding there, a prefill stops decoding once; a prompt is short, a dialogue is not."""


class Order(NamedTuple):
    """A request for a server. is_test: only the prompt is tested, and the request keeps waiting."""

    key: int
    server: str
    is_test: bool


class _Lane(NamedTuple):
    """Requests of a prompt that wait for the same servers: for the one that has their dialogues cached or, if that is "", for
    the prompt's homes."""

    prompt: str
    cached_at: str


class Dispatch:
    """The requests of a fleet by key, waiting or under way, and the suspect prompts.

    concurrency: requests under way per server. deaths: prompt -> number of servers that died with it, until it is answered;
    prompts that have deaths at the start are suspect.
    """

    def __init__(self, concurrency: int, deaths: Mapping[str, int]) -> None:
        self._concurrency = concurrency
        self._prompts: dict[int, str] = {}  # of all requests
        self._counts: Counter[str] = Counter()  # by prompt: all its requests
        self._cached_at: dict[int, str] = {}  # of requests that continue a dialogue: the server that has it cached
        self._waiting: deque[int] = deque()
        self._lanes: dict[_Lane, deque[int]] = {}
        self._lanes_at: dict[str, dict[_Lane, None]] = {}  # by server: those that wait for it
        self._held: dict[str, deque[int]] = {}  # by suspect prompt: its requests, which may not start
        self._homes: dict[str, dict[str, int]] = {}  # by prompt and server: number of requests under way
        self._servers: dict[int, str] = {}  # of requests under way
        self._load: Counter[str] = Counter()
        self._harmless: set[str] = set()
        self._suspects = dict.fromkeys(deaths, "")  # prompt -> the server that died with it
        self._testing: tuple[str, str] | None = None  # prompt and server
        self.deaths = dict(deaths)
        self.apart: str | None = None
        """The server reserved for tests."""
        self.unproved: list[str] = []
        """Prompts that could have used another home when `next` returned None, see `is_harmless`."""

    @property
    def waits(self) -> bool:
        """Whether any request waits."""
        return bool(self._waiting or self._lanes or self._held)

    def add(self, key: int, prompt: str, *, first: bool = False, cached_at: str = "") -> None:
        """Add a request. first: ahead of all others. cached_at: the server that drew the dialogue that it continues."""
        self._prompts[key] = prompt
        self._counts[prompt] += 1
        if cached_at:
            self._cached_at[key] = cached_at
            self.is_harmless(prompt)  # a turn of it is complete
        self._wait([key], first=first)

    def next(self, serving: Sequence[str], *, spare_last: bool, routed: bool) -> Order | None:
        """The next request to start at one of these servers, which then counts as started; None if there is none.

        spare_last: test nothing at the only server. routed: requests other than tests may be at another server than the one
        they are counted for, so a server counts as idle only when nothing is under way anywhere, and prompts have one home.
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
        """Count a request under way at the least busy of these servers from now on; returns that server."""
        left, server = self._servers[key], min(servers, key=self._load.__getitem__)
        self._arrive(key, server)
        self._leave(key, left)
        return server

    def ended(self, key: int) -> None:
        """The request is no longer under way; call `again` or `forget` next."""
        self._leave(key, self._servers.pop(key))

    def again(self, key: int) -> None:
        """Let the request wait again, ahead of all others."""
        self._wait([key], first=True)

    def forget(self, key: int) -> None:
        """Drop a request that does not wait: it was answered, or nobody wants it any more."""
        prompt = self._prompts.pop(key)
        self._cached_at.pop(key, None)
        self._counts[prompt] -= 1
        if not self._counts[prompt]:
            del self._counts[prompt]
            self._harmless.discard(prompt)

    def withdraw(self, keys: Iterable[int]) -> None:
        """Drop those of these requests that wait."""
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
        """A server (its name, or "" if unknown) died with this prompt under way. Repeated calls, for each of the prompt's
        requests there, count as one death."""
        if prompt not in self._suspects:
            self.deaths[prompt] = self.deaths.get(prompt, 0) + 1
            self._suspects[prompt] = server
            self._hold(prompt, [key for key in self._waiting if self._prompts[key] == prompt])
            self._waiting = deque(key for key in self._waiting if self._prompts[key] != prompt)
            for lane in [lane for lane in self._lanes if lane.prompt == prompt]:
                self._hold(prompt, self._pop_lane(lane))

    def end_test(self, *, survived: bool | None) -> list[int]:
        """End the test under way. survived: whether the server lives; None if the test was cut off or did not reach it.

        Returns the requests of a convicted prompt, which are dropped unless they are under way.
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
        """A response to the prompt is complete: forget its deaths, unless it is suspect now."""
        if prompt not in self._suspects:
            self.deaths.pop(prompt, None)
            self.is_harmless(prompt)

    def is_harmless(self, prompt: str) -> None:
        """The prompt may have several homes, if no server has died with it since it was last answered. Forgotten with its last
        request."""
        if prompt in self._counts and prompt not in self.deaths:
            self._harmless.add(prompt)

    def clear(self) -> None:
        """Drop all requests, none of which may be under way; suspicions stay."""
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
        if self.apart is not None and self.apart in serving:  # it has had only tests
            idle = [self.apart, *idle]
        for name in idle:
            for prompt in self._held:
                # Its other requests at the dead server must have ended first, or their end would count as another death. Those
                # at other servers may go on: they began before it was suspect.
                is_back = all(home in serving and not routed for home in self._homes.get(prompt, ()))
                if is_back and (self._suspects[prompt] != name or len(serving) == 1):
                    self.apart = name
                    self._load[name] += 1
                    self._testing = prompt, name
                    return Order(self._held[prompt][0], name, True)
        self.apart = None
        return None

    def _share(self, servers: int) -> int:
        """Requests of each of so many servers, rounded up, without those that are held."""
        return -(-(len(self._prompts) - sum(map(len, self._held.values()))) // servers)

    def _has_place(self, server: str, lane: _Lane, share: int) -> bool:
        """Whether one that has these requests' prompt or dialogues cached takes another of them."""
        excess = max(1, share // _DIALOGUE_DIVISOR) if lane.cached_at else share // _HOME_DIVISOR
        return self._load[server] < share + excess

    def _may_have(self, server: str, prompt: str) -> bool:
        homes = self._homes.get(prompt)
        return not homes or server in homes or self._may_spread(prompt)

    def _may_spread(self, prompt: str) -> bool:
        return prompt in self._harmless and prompt not in self.deaths

    def _next_set_aside(self, free: Sequence[str], share: int) -> Order | None:
        """One that waited for a server that now has a place for it."""
        for name in free:
            for lane in sorted(self._lanes_at.get(name, ()), key=lambda lane: not lane.cached_at):  # dialogues first
                if self._has_place(name, lane, share) and self._may_have(name, lane.prompt):
                    return self._begin(self._from_lane(lane), name)
        return None

    def _set_dialogues_aside(self, usable: Collection[str]) -> None:
        """Let begun dialogues at the head of the queue wait for their servers, ahead of other requests there."""
        while self._waiting and (lane := self._lane_of(self._waiting[0], usable)).cached_at:
            self._set_aside(self._waiting.popleft(), lane)

    def _lane_of(self, key: int, usable: Collection[str]) -> _Lane:
        prompt, cached_at = self._prompts[key], self._cached_at.get(key, "")
        return _Lane(prompt, cached_at if cached_at in usable and self._may_have(cached_at, prompt) else "")

    def _next_waiting(self, usable: Collection[str], free: Sequence[str], share: int) -> Order | None:
        """The first that waits and whose servers have a place for it; those before it are set aside."""
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
        """One that has no place at its servers, for another one that is below its share."""
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
        """The request is not at this server any more."""
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
        """Dialogues do not wait for servers that are not used any more."""
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
        """All its requests, which are not set aside any more."""
        for name in self._servers_of(lane):
            self._lanes_at.get(name, {}).pop(lane, None)
        return self._lanes.pop(lane, deque())
