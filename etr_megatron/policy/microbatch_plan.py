"""Assign samples to data-parallel ranks, and each rank's samples to microbatches. Pure Python.

Invariants (tested): every sample appears exactly once; every data-parallel rank has the same number of microbatches, a multiple
of `multiple`; no microbatch exceeds the token budget unless it is a single longer sample; the same input gives the same plan.
The plan minimizes the cost of the costliest rank and of each rank's costliest microbatch. The number of microbatches is the
smallest that suffices on every rank. Up to `_EXACT` samples the plan is optimal, unless the search is cut off. Beyond that it
is greedy: the costliest sample goes first, into the cheapest part with room, which may take a few percent more microbatches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_EXACT = 16
_SEARCH_STEPS = 50_000
"""Partial assignments that a search tries before it returns the best so far. The limit applies once to the split over ranks,
and once to the microbatches of all ranks together. This takes tenths of a second, for which every rank waits at every pass."""


def plan_microbatches(
    lengths: Sequence[int], *, dp: int, token_budget: int, costs: Sequence[int] | None = None, multiple: int = 1
) -> list[list[list[int]]]:
    """Sample indices by [data-parallel rank][microbatch].

    lengths: tokens (prompt, response and padding) of each sample. costs: cost of each sample in any unit; None is its length.
    multiple: divides the number of microbatches of a rank. Ranks with few samples may get empty microbatches.
    """
    costs = lengths if costs is None else costs
    ranks = _balance(range(len(lengths)), costs, dp, _SEARCH_STEPS) or []  # never None without a limit
    count = max(1, *(_fewest(rank, lengths, token_budget) for rank in ranks))
    while True:
        whole = -(-count // multiple) * multiple
        plan = [_balance(rank, costs, whole, _SEARCH_STEPS // dp, lengths, token_budget) for rank in ranks]
        found = [rank for rank in plan if rank is not None]
        if len(found) == dp:
            return found
        count = whole + 1


def _fewest(samples: Sequence[int], sizes: Sequence[int], limit: int) -> int:
    """Lower bound on the parts needed: one for each sample above `limit`, and enough for the total size of the others; two
    samples above half of `limit` never share a part."""
    short = [sizes[i] for i in samples if sizes[i] <= limit]
    large = sum(2 * sizes[i] > limit for i in samples)
    return max(large, len(samples) - len(short) + -(-sum(short) // limit))


def _balance(
    samples: Sequence[int],
    costs: Sequence[int],
    parts: int,
    steps: int,
    sizes: Sequence[int] | None = None,
    limit: int = 0,
) -> list[list[int]] | None:
    """Split the samples into `parts` parts, sorted costliest first, minimizing the costliest within `steps`; None if none fits.

    With `sizes`, a part is one sample or has sizes that add up to at most `limit`.
    """
    search = _Search(sorted(samples, key=lambda i: (-costs[i], i)), costs, parts, steps, sizes, limit)
    search.greedy()
    if len(samples) <= _EXACT:
        search.descend(0)
    if search.best is None:
        return None
    return sorted((sorted(part) for part in search.best), key=lambda part: (-sum(costs[i] for i in part), part))


class _Search:
    """Depth-first search for the assignment with the cheapest costliest part; assigns the costliest sample first."""

    def __init__(
        self, order: list[int], costs: Sequence[int], parts: int, steps: int, sizes: Sequence[int] | None, limit: int
    ) -> None:
        self.order, self.costs, self.steps, self.sizes, self.limit = order, costs, steps, sizes, limit
        self.parts: list[list[int]] = [[] for _ in range(parts)]
        self.cost, self.size = [0] * parts, [0] * parts
        self.best: list[list[int]] | None = None
        self.best_cost: float = float("inf")
        # No assignment is cheaper than an even share or than the costliest sample.
        self.bound = max(-(-sum(costs[i] for i in order) // parts), max((costs[i] for i in order), default=0))

    def greedy(self) -> None:
        """Assign each sample to the cheapest part that has room."""
        cheapest = [(0, part) for part in range(len(self.parts))]
        for sample in self.order:
            full: list[tuple[int, int]] = []
            while cheapest and not self._fits(sample, cheapest[0][1]):
                full.append(heapq.heappop(cheapest))
            if not cheapest:
                break
            part = cheapest[0][1]
            self._put(sample, part)
            heapq.heapreplace(cheapest, (self.cost[part], part))
            for entry in full:
                heapq.heappush(cheapest, entry)
        else:
            self._keep()
        for part, samples in enumerate(self.parts):
            for sample in tuple(samples):
                self._take(sample, part)

    def descend(self, number: int) -> None:
        """Try the samples from `number` on in every part that could improve on the best so far."""
        if number == len(self.order):
            self._keep()
            return
        sample, seen = self.order[number], set()
        for part in sorted(range(len(self.parts)), key=lambda p: self.cost[p]):
            alike = (self.cost[part], self.size[part])
            if alike in seen or self.cost[part] + self.costs[sample] >= self.best_cost or not self._fits(sample, part):
                continue
            if self.best_cost <= self.bound or self.steps <= 0:
                return
            seen.add(alike)
            self.steps -= 1
            self._put(sample, part)
            self.descend(number + 1)
            self._take(sample, part)

    def _fits(self, sample: int, part: int) -> bool:
        return self.sizes is None or not self.parts[part] or self.size[part] + self.sizes[sample] <= self.limit

    def _put(self, sample: int, part: int) -> None:
        self.parts[part].append(sample)
        self.cost[part] += self.costs[sample]
        self.size[part] += self.sizes[sample] if self.sizes else 0

    def _take(self, sample: int, part: int) -> None:
        self.parts[part].remove(sample)
        self.cost[part] -= self.costs[sample]
        self.size[part] -= self.sizes[sample] if self.sizes else 0

    def _keep(self) -> None:
        self.best, self.best_cost = [list(part) for part in self.parts], max(self.cost)
