"""Several training sets with a share of the prompts each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from etr_megatron.data.cursor import PromptCursor
from etr_megatron.data.problems import ProblemSet, set_of
from etr_megatron.errors import UserError
from etr_megatron.types import Problem


class BlendedCursor:
    """Deals out problems of several sets, with a cursor for each, so that each set has its own epochs.

        cursor = BlendedCursor(problems, {"gsm8k": 1, "math": 3}, seed=1, shuffle=True)
        step = cursor.next(16)                    # 4 of gsm8k, 12 of math

    The next problem is always from the set that is furthest behind its share, so every few problems have the shares, as do
    minibatches. A step has no problem twice: when it has all problems of a set, the other sets give the rest, which this set
    does not make up for later.
    """

    def __init__(self, problems: ProblemSet, weights: Mapping[str, float], *, seed: int, shuffle: bool) -> None:
        """problems: of all sets, see `named`. weights: of every set by name, above 0; only their ratios count."""
        sets: dict[str, list[Problem]] = {name: [] for name in weights}
        for problem in problems:
            sets[set_of(problem.id)].append(problem)
        self._size = len(problems)
        self._shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self._cursors = {name: PromptCursor(ProblemSet(own), seed, shuffle) for name, own in sets.items()}
        self._owed = dict.fromkeys(weights, 0.0)  # the problems by which a set is behind its share

    def __len__(self) -> int:
        """Number of problems of all sets, the most that a step can ask for."""
        return self._size

    def next(self, n: int, after: Collection[str] = ()) -> list[Problem]:
        """The next `n` problems, all different. See `PromptCursor.next`."""
        if n + len(after) > self._size:
            raise UserError(
                f"a step asks for {n + len(after)} prompts, but there are only {self._size} problems in all sets of "
                "data.train: lower rollout.prompts_per_step or give more data"
            )
        had = Counter(map(set_of, after))
        chosen = [self._choose(had) for _ in range(n)]
        counts = Counter(chosen)
        dealt = {
            name: iter(self._cursors[name].next(count, [one for one in after if set_of(one) == name]))
            for name, count in counts.items()
        }
        return [next(dealt[name]) for name in chosen]

    def _choose(self, had: Counter[str]) -> str:
        """The set of the next problem, which then counts. had: number of problems of each set in the same step (in place)."""
        left = [name for name, cursor in self._cursors.items() if had[name] < len(cursor)]
        shares = sum(self._shares[name] for name in left)
        for name in left:
            self._owed[name] += self._shares[name] / shares
        name = max(left, key=lambda name: self._owed[name])
        self._owed[name] -= 1
        had[name] += 1
        return name

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        sets = {name: cursor.state_dict() for name, cursor in self._cursors.items()}
        return {"sets": sets, "shares": self._shares, "owed": dict(self._owed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. Weights may differ: shares then count from here on.

        Raises:
            UserError: the state belongs to other sets, problems or another order; the cursor is then unchanged.
        """
        if state.get("sets", {}).keys() != self._cursors.keys():
            had = " and ".join(state["sets"]) if "sets" in state else "all sets together"
            raise UserError(
                f"the checkpoint's data position does not fit this run: data.train_weights was for {had}; restore it, or start "
                "under another run.name"
            )
        before = {name: cursor.state_dict() for name, cursor in self._cursors.items()}
        try:
            for name, cursor in self._cursors.items():
                cursor.load_state_dict(state["sets"][name])
        except UserError:
            for name, cursor in self._cursors.items():
                cursor.load_state_dict(before[name])
            raise
        self._owed = dict(state["owed"]) if state["shares"] == self._shares else dict.fromkeys(self._shares, 0.0)


AnyCursor = PromptCursor | BlendedCursor
"""What deals out problems to a sampler."""
