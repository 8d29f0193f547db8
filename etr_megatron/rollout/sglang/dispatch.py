"""Which waiting request goes to which server next, so that a prompt that no server survives costs no more than two of them.

1. All requests of a prompt are at one server at a time. If that dies of them, it dies alone.
2. What was under way at a server that died is suspect, as nobody knows which of it the server died of.
3. A suspect prompt is tested before anything of it is asked again: alone, at a server that has nothing else and is not the one
   that died with it, one prompt at a time. The last server is spared where others can come back. If the server dies, it was the
   prompt; if not, it was another, or the server's own death.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Order(NamedTuple):
    """A request for a server. is_test: it is the prompt that is tried, and the request goes on waiting."""

    key: int
    server: str
    is_test: bool


class _Home(NamedTuple):
    server: str
    under_way: int


class Dispatch:
    """The requests of a fleet by key, those that wait and those that are under way, and prompts under suspicion.

    concurrency: requests under way per server. deaths: by prompt, of servers that had it, until it is answered; prompts that
    have some at the start are suspect.
    """

    def __init__(self, concurrency: int, deaths: Mapping[str, int]) -> None:
        self._concurrency = concurrency
        self._prompts: dict[int, str] = {}  # of all requests
        self._waiting: deque[int] = deque()
        self._aside: dict[str, deque[int]] = {}  # by prompt: may not go anywhere now
        self._full: dict[str, dict[str, None]] = {}  # by server: prompts aside that are at home there
        self._held: dict[str, None] = {}  # prompts aside that are suspect
        self._homes: dict[str, _Home] = {}
        self._servers: dict[int, str] = {}  # of what is under way
        self._load: Counter[str] = Counter()
        self._suspects = dict.fromkeys(deaths, "")  # prompt -> the server that died with it
        self._testing: tuple[str, str] | None = None  # prompt and server
        self.deaths = dict(deaths)
        self.apart: str | None = None
        """The server that tests have for themselves."""

    @property
    def waits(self) -> bool:
        """Whether anything does."""
        return bool(self._waiting or self._aside)

    def add(self, key: int, prompt: str, *, first: bool = False) -> None:
        """A new request. first: before all others."""
        self._prompts[key] = prompt
        self._wait([key], first=first)

    def next(self, serving: Sequence[str], *, spare_last: bool, routed: bool) -> Order | None:
        """What is to begin now at one of these servers; it is taken to have begun.

        spare_last: nothing is tested at the only one. routed: requests but for tests are not at the servers that they are
        counted for, so that none is known to have nothing until all have.
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
        """What is under way is so at the least busy of these servers from now on."""
        server = min(servers, key=self._load.__getitem__)
        self._load[self._servers[key]] -= 1
        self._load[server] += 1
        self._servers[key] = server
        return server

    def ended(self, key: int) -> None:
        """Nothing of this request is under way any more: it is to be `again`, or `forget`."""
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
        """It waits again, before all others."""
        self._wait([key], first=True)

    def forget(self, key: int) -> None:
        """It was answered, or is not to be: it does not wait."""
        del self._prompts[key]

    def withdraw(self, keys: Iterable[int]) -> None:
        """Of these, what waits does no more."""
        gone = set(keys)
        self._waiting = deque(key for key in self._waiting if key not in gone)
        for prompt, aside in list(self._aside.items()):
            self._aside[prompt] = deque(key for key in aside if key not in gone)
            if not self._aside[prompt]:
                self._drop_aside(prompt)
        for key in gone - self._servers.keys():
            self._prompts.pop(key, None)

    def suspect(self, prompt: str, server: str) -> None:
        """A server (a name, or "" where it is not known) has died that had it under way; said of each of its requests there, it
        counts once."""
        if prompt not in self._suspects:
            self.deaths[prompt] = self.deaths.get(prompt, 0) + 1
            self._suspects[prompt] = server
            home = self._homes.get(prompt)
            if prompt in self._aside:
                self._held[prompt] = None
                if home is not None:
                    self._full.get(home.server, {}).pop(prompt, None)

    def end_test(self, *, survived: bool | None) -> list[int]:
        """Of the test that is under way: whether the server lives, None where the test was cut off or did not reach it.

        Returns the requests of a prompt that is convicted, which are forgotten.
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
        """A response to it is complete."""
        if prompt not in self._suspects:
            self.deaths.pop(prompt, None)

    def clear(self) -> None:
        """Forget all requests, of which none is under way; suspicions stay."""
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
        if self.apart is not None and self.apart in serving:  # it has had nothing but tests
            idle = [self.apart, *idle]
        for name in idle:
            for prompt in self._held:
                # What else of it was at the server that died has to be back, or its end would count as another death.
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
