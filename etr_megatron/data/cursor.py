"""The order of problems: a position in an endless, reproducible order that a checkpoint can store."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from etr_megatron.data.problems import ProblemSet
from etr_megatron.errors import UserError
from etr_megatron.types import Problem


class PromptCursor:
    """Deals out problems epoch by epoch.

        cursor = PromptCursor(problems, seed=1, shuffle=True)
        step = cursor.next(16)

    Every problem comes once per epoch, in an order that depends on (seed, epoch). Nothing is dropped at the end of an epoch: a
    step takes the rest of it and continues in the next epoch. The problems of one `next` are distinct, because a group's id is
    `<problem id>@<step>`: in a step that crosses the boundary, the problems from the old epoch move to the end of the new one.
    """

    def __init__(self, problems: ProblemSet, seed: int, shuffle: bool) -> None:
        self._problems = problems
        self._seed = seed
        self._shuffle = shuffle
        self._position: int
        self._start_epoch(0, deferred=[])

    def __len__(self) -> int:
        """Problems in an epoch."""
        return len(self._problems)

    def next(self, n: int, after: Collection[str] = ()) -> list[Problem]:
        """The next `n` problems, all different.

        after: ids of problems that the same step already has; these are not repeated.

        Raises:
            UserError: there are fewer than `n` problems besides `after`.
        """
        if n + len(after) > len(self._problems):
            raise UserError(
                f"a step asks for {n + len(after)} prompts, but there are only {len(self._problems)} problems: lower "
                "rollout.prompts_per_step or give more data"
            )
        taken = self._order[self._position : self._position + n]
        self._position += len(taken)
        if len(taken) < n:
            names = set(after)
            had = [index for index in self._order if self._problems[index].id in names] if names else []
            self._start_epoch(self._epoch + 1, deferred=sorted({*taken, *had}))
            self._position = n - len(taken)
            taken += self._order[: self._position]
        return [self._problems[index] for index in taken]

    @property
    def epoch(self) -> float:
        """Epochs dealt out so far, with the fraction of the current one."""
        return self._epoch + self._position / len(self._problems)

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the cursor's position, and the identity of the problems and their order."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "deferred": list(self._deferred),
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            UserError: the state belongs to other problems or another order; the cursor is then unchanged.
        """
        names = {
            "problems": "the number of problems",
            "fingerprint": "the problems' fingerprint (sets, ids, text, answers, templates, tokenizer and reward.columns)",
            "seed": "run.seed",
            "shuffle": "data.shuffle",
        }
        if "sets" in state:
            raise UserError(
                "the checkpoint's data position does not fit this run: data.train_weights was given; restore it, or start "
                "under another run.name"
            )
        for key, value in self._identity().items():
            if state[key] != value:
                raise UserError(
                    f"the checkpoint's data position does not fit this run: {names[key]} was {state[key]} and is {value}; "
                    "restore the data and settings it was made with, or start under another run.name"
                )
        self._start_epoch(state["epoch"], deferred=state["deferred"])
        self._position = state["position"]

    def _identity(self) -> dict[str, Any]:
        return {
            "problems": len(self._problems),
            "fingerprint": self._problems.fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _start_epoch(self, epoch: int, deferred: list[int]) -> None:
        order = list(range(len(self._problems)))
        if self._shuffle:
            random.Random(f"{self._seed}:{epoch}").shuffle(order)
        late = set(deferred)
        self._order = [i for i in order if i not in late] + [i for i in order if i in late]
        self._epoch, self._position, self._deferred = epoch, 0, list(deferred)
