"""Decides which attention group of a server gets a request, if the server has several (`sglang.dp_attention`).

Every group has a prefix cache of its own. The rules are those by which `dispatch.py` chooses servers, and so are the limits,
because a prefill in one group holds up the decoding of all groups of its server:

1. A further turn of a dialogue goes to the group that drew the previous turn, until that group is half above its share.
2. Other requests go to the groups that have requests of the same prompt, until these are an eighth above their share.
3. If there is none, a request goes to the least busy group.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from etr_megatron.rollout.sglang.dispatch import most_where_cached


class AttentionGroups:
    """The requests in flight in each group of each server."""

    def __init__(self) -> None:
        self._load: defaultdict[str, Counter[int]] = defaultdict(Counter)  # by server and group
        self._started: defaultdict[str, Counter[int]] = defaultdict(Counter)  # the same, with requests that have ended
        self._homes: defaultdict[tuple[str, str], Counter[int]] = defaultdict(Counter)  # by server, prompt and group

    def enter(self, server: str, count: int, prompt: str, *, share: int, cached_in: int | None = None) -> int | None:
        """The group for a request that goes to a server of `count` groups; None if the server has only one.

        share: the server's share of all requests, in flight or waiting. cached_in: if the request continues a dialogue that
        this server generated, its group.
        """
        if count < 2:
            return None
        group = self._choose(server, count, prompt, -(-share // count), cached_in)
        self._load[server][group] += 1
        self._started[server][group] += 1
        self._homes[server, prompt][group] += 1
        return group

    def leave(self, server: str, prompt: str, group: int | None) -> None:
        """A request that `enter` gave this group is no longer in flight there."""
        if group is None:
            return
        self._load[server][group] -= 1
        homes = self._homes[server, prompt]
        homes[group] -= 1
        if not homes[group]:
            del homes[group]
        if not homes:
            del self._homes[server, prompt]

    def _choose(self, server: str, count: int, prompt: str, share: int, cached_in: int | None) -> int:
        load, started = self._load[server], self._started[server]
        if cached_in is not None and cached_in < count and load[cached_in] < most_where_cached(share, is_dialogue=True):
            return cached_in
        most = most_where_cached(share, is_dialogue=False)
        homes = [group for group in self._homes.get((server, prompt), ()) if group < count and load[group] < most]
        # Of groups with equal loads, the one that had the fewest requests: dialogues between two turns are in no load.
        return min(homes or range(count), key=lambda group: (load[group], started[group]))
