"""Decides which waiting request goes to which server next. A prompt that kills every server that it comes to then costs two of
them, or three if it kills only after a while.

1. All requests of a prompt are at one server at a time. If they kill it, they kill no other.
2. All prompts under way at a server that died are suspect, as it is not known which of them killed it.
3. A suspect prompt is tested before its requests go anywhere again: one prompt at a time, at a server that has nothing else and
   is not the one that died with it. The last server is spared if others can come back. If the server dies, it was the prompt;
   if not, it was another prompt or a fault of the server itself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Order(NamedTuple):
    """A request for a server. is_test: only the prompt is tested, and the request keeps waiting."""

    key: int
    server: str
    is_test: bool


class _Home(NamedTuple):
    server: str
    under_way: int


class Dispatch:
    """The requests of a fleet by key, waiting or under way, and the suspect prompts.

    concurrency: requests under way per server. deaths: prompt -> number of servers that died with it, until it is answered;
    prompts that have deaths at the start are suspect.
    """

    def __init__(self, concurrency: int, deaths: Mapping[str, int]) -> None:
        self._concurrency = concurrency
        self._prompts: dict[int, str] = {}  # of all requests
        self._waiting: deque[int] = deque()
        self._aside: dict[str, deque[int]] = {}  # by prompt: requests that may not start now
        self._full: dict[str, dict[str, None]] = {}  # by server: prompts set aside that are at home there
        self._held: dict[str, None] = {}  # suspect prompts set aside
        self._homes: dict[str, _Home] = {}
        self._servers: dict[int, str] = {}  # of requests under way
        self._load: Counter[str] = Counter()
        self._suspects = dict.fromkeys(deaths, "")  # prompt -> the server that died with it
        self._testing: tuple[str, str] | None = None  # prompt and server
        self.deaths = dict(deaths)
        self.apart: str | None = None
        """The server reserved for tests."""

    @property
    def waits(self) -> bool:
        """Whether any request waits."""
        return bool(self._waiting or self._aside)

    def add(self, key: int, prompt: str, *, first: bool = False) -> None:
        """Add a request. first: ahead of all others."""
        self._prompts[key] = prompt
        self._wait([key], first=first)

    def next(self, serving: Sequence[str], *, spare_last: bool, routed: bool) -> Order | None:
        """The next request to start at one of these servers, which then counts as started; None if there is none.

        spare_last: test nothing at the only server. routed: requests other than tests may be at another server than the one
        they are counted for, so a server counts as idle only when nothing is under way anywhere.
        """
        if (test := self._next_test(serving, spare_last=spare_last, routed=routed)) is not None:
            return test
        free = {name: None for name in serving if name != self.apart and self._load[name] < self._concurrency}
        for name in free:
            for prompt in self._full.get(name, ()):
                return self._begin(self._from_aside(prompt), name)
        while self._waiting and free:
            key = self._waiting.popleft()
            home = self._homes.get(self._prompts[key])
            if self._prompts[key] in self._suspects or (home is not None and home.server not in free):
                self._put_aside(key)
            else:
                return self._begin(key, min(free, key=self._load.__getitem__) if home is None else home.server)
        return None

    def move(self, key: int, servers: Iterable[str]) -> str:
        """Count a request under way at the least busy of these servers from now on; returns that server."""
        server = min(servers, key=self._load.__getitem__)
        self._load[self._servers[key]] -= 1
        self._load[server] += 1
        self._servers[key] = server
        return server

    def ended(self, key: int) -> None:
        """The request is no longer under way; call `again` or `forget` next."""
        self._load[self._servers.pop(key)] -= 1
        prompt = self._prompts[key]
        home = self._homes[prompt]
        self._homes[prompt] = home._replace(under_way=home.under_way - 1)
        if home.under_way == 1:
            del self._homes[prompt]
            self._full.get(home.server, {}).pop(prompt, None)
            if prompt not in self._suspects:
                self._wait(self._aside.pop(prompt, ()), first=True)

    def again(self, key: int) -> None:
        """Let the request wait again, ahead of all others."""
        self._wait([key], first=True)

    def forget(self, key: int) -> None:
        """Drop a request that does not wait: it was answered, or nobody wants it any more."""
        del self._prompts[key]

    def withdraw(self, keys: Iterable[int]) -> None:
        """Drop those of these requests that wait."""
        gone = set(keys)
        self._waiting = deque(key for key in self._waiting if key not in gone)
        for prompt, aside in list(self._aside.items()):
            self._aside[prompt] = deque(key for key in aside if key not in gone)
            if not self._aside[prompt]:
                self._drop_aside(prompt)
        for key in gone - self._servers.keys():
            self._prompts.pop(key, None)

    def suspect(self, prompt: str, server: str) -> None:
        """A server (its name, or "" if unknown) died with this prompt under way. Repeated calls, for each of the prompt's
        requests there, count as one death."""
        if prompt not in self._suspects:
            self.deaths[prompt] = self.deaths.get(prompt, 0) + 1
            self._suspects[prompt] = server
            home = self._homes.get(prompt)
            if prompt in self._aside:
                self._held[prompt] = None
                if home is not None:
                    self._full.get(home.server, {}).pop(prompt, None)

    def end_test(self, *, survived: bool | None) -> list[int]:
        """End the test under way. survived: whether the server lives; None if the test was cut off or did not reach it.

        Returns the requests of a convicted prompt, which are dropped.
        """
        assert self._testing is not None
        (prompt, server), self._testing = self._testing, None
        self._load[server] -= 1
        if survived is None:
            return []
        self._suspects.pop(prompt, None)
        if survived:
            keys = self._aside.get(prompt, ())
            self._drop_aside(prompt)
            self._wait(keys, first=True)
            return []
        self.deaths.pop(prompt, None)
        gone = [key for key, of in self._prompts.items() if of == prompt]
        self.withdraw(gone)
        return gone

    def clear_of_suspicion(self, prompt: str) -> None:
        """A response to the prompt is complete: forget its deaths, unless it is suspect now."""
        if prompt not in self._suspects:
            self.deaths.pop(prompt, None)

    def clear(self) -> None:
        """Drop all requests, none of which may be under way; suspicions stay."""
        self._prompts.clear()
        self._waiting.clear()
        self._aside.clear()
        self._held.clear()
        self._full.clear()
        self.apart = None

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
                # Its other requests at the dead server must have ended first, or their end would count as another death.
                is_back = prompt not in self._homes
                if is_back and (self._suspects[prompt] != name or len(serving) == 1):
                    self.apart = name
                    self._load[name] += 1
                    self._testing = prompt, name
                    return Order(self._aside[prompt][0], name, True)
        self.apart = None
        return None

    def _begin(self, key: int, server: str) -> Order:
        prompt = self._prompts[key]
        home = self._homes.get(prompt, _Home(server, 0))
        self._homes[prompt] = home._replace(under_way=home.under_way + 1)
        self._load[server] += 1
        self._servers[key] = server
        return Order(key, server, False)

    def _wait(self, keys: Iterable[int], *, first: bool) -> None:
        keys = list(keys)
        if keys and self._prompts[keys[0]] in self._suspects:
            for key in keys:
                self._put_aside(key)
        elif first:
            self._waiting.extendleft(reversed(keys))
        else:
            self._waiting.extend(keys)

    def _put_aside(self, key: int) -> None:
        prompt = self._prompts[key]
        self._aside.setdefault(prompt, deque()).append(key)
        if prompt in self._suspects:
            self._held[prompt] = None
        else:
            self._full.setdefault(self._homes[prompt].server, {})[prompt] = None

    def _from_aside(self, prompt: str) -> int:
        key = self._aside[prompt].popleft()
        if not self._aside[prompt]:
            self._drop_aside(prompt)
        return key

    def _drop_aside(self, prompt: str) -> None:
        self._aside.pop(prompt, None)
        self._held.pop(prompt, None)
        if prompt in self._homes:
            self._full.get(self._homes[prompt].server, {}).pop(prompt, None)
