"""Evaluation on held-out problems: the sets, the current policy's responses and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etr_megatron.config import Config, samples_of_set
from etr_megatron.data import named
from etr_megatron.metrics import response_metrics
from etr_megatron.rollout import RolloutEngine, Sampling, grade_groups
from etr_megatron.rollout.collect import Decode, Grader
from etr_megatron.rollout.dialogues import Dialogues
from etr_megatron.rollout.engine import MustStop
from etr_megatron.rollout.rounds import draw_groups
from etr_megatron.types import Group, Problem

WithServers = Callable[[Callable[[], list[Group]]], list[Group]]
"""Calls a function that generates responses. If servers have to be restarted, it syncs the weights and calls it again."""


@dataclass(frozen=True)
class HeldOut:
    """The problems of every set of `data.eval`, by set name. A single unnamed set has the name "". Problem ids are those that
    `named` makes."""

    sets: Mapping[str, Sequence[Problem]]

    @classmethod
    def of(cls, sets: Iterable[tuple[str, Sequence[Problem]]], at_most: int) -> HeldOut:
        """The first `at_most` problems of each set."""
        return cls({name: named(name, problems[:at_most]) for name, problems in sets})

    @property
    def problems(self) -> list[Problem]:
        """The problems of all sets, in order."""
        return [problem for problems in self.sets.values() for problem in problems]


def evaluate(
    engine: RolloutEngine,
    held_out: HeldOut,
    config: Config,
    *,
    decode: Decode,
    grader: Grader | None,
    dialogues: Dialogues | None = None,
    must_stop: MustStop,
    with_servers: WithServers,
) -> dict[str, list[Group]]:
    """Graded responses to all held-out problems under the engine's current weights, by set.

    A collective. Only rank 0 needs `grader` and, with an environment, `dialogues`. Other ranks may get responses without
    tokens. Raises UngradedError and the errors of `engine.generate`.
    """
    sampling = Sampling(
        samples=tuple(samples_of_set(config, name) for name, problems in held_out.sets.items() for _ in problems),
        max_tokens=config.eval.max_response_tokens or config.rollout.max_response_tokens,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
        seed=config.run.seed,
        step=-1,  # the same seeds at every evaluation, distinct from those of training steps
    )
    has_turns = config.environment.function is not None
    groups = with_servers(lambda: draw_groups(engine, held_out.problems, sampling, dialogues, must_stop, has_turns=has_turns))
    grade_groups(groups, decode, grader)
    rest = iter(groups)
    return {name: [next(rest) for _ in problems] for name, problems in held_out.sets.items()}


def evaluation_metrics(sets: Mapping[str, Sequence[Group]], config: Config) -> dict[str, float]:
    """Metrics of graded held-out responses: for each metric the mean over the sets that have it, and the value of each named
    set."""
    each = {name: _metrics_of(groups, config) for name, groups in sets.items()}
    values: dict[str, list[float]] = {}
    for one in each.values():
        for key, value in one.items():
            values.setdefault(key, []).append(value)
    found = {f"eval_{key}": sum(several) / len(several) for key, several in values.items()}
    return found | {f"eval/{name}/{key}": value for name, one in each.items() if name for key, value in one.items()}


def best_steps(rows: Iterable[Mapping[str, Any]], metric: str) -> list[int]:
    """Steps of the rows that have `metric`, the best first. Ties are broken by the mean evaluation reward, then by the later
    step."""
    evaluated = [row for row in rows if row.get(metric) is not None]
    evaluated.sort(key=lambda row: (row[metric], row.get("eval_reward_mean") or 0.0, row["step"]), reverse=True)
    return [row["step"] for row in evaluated]


def _metrics_of(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """`response_metrics` (avg@k), the fraction of truncated responses, with an environment the fraction of responses that a
    failed call ended, and with several responses per problem pass@k."""
    samples = [sample for group in groups for sample in group.samples]
    found = response_metrics(samples, config)
    found["truncated_frac"] = sum(sample.finish_reason == "length" for sample in samples) / len(samples)
    if config.environment.function is not None:
        found["environment_failed_frac"] = sum(sample.call_failed for sample in samples) / len(samples)
    if len(samples) > len(groups):
        right = (any(sample.reward == config.reward.range_max for sample in group.samples) for group in groups)
        found["pass_at_k"] = sum(right) / len(groups)
    return found
