"""Samplers, which return a step's groups: generated step by step, or recorded by another run. `streaming.py` has the third,
which generates them during training."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from etr_megatron.config import Config
from etr_megatron.data import AnyCursor
from etr_megatron.errors import UserError
from etr_megatron.rollout.collect import Decode, Grader, LateSteps, grade_groups
from etr_megatron.rollout.engine import MustStop, RolloutEngine, Sampling, never
from etr_megatron.rollout.rank0 import on_rank0
from etr_megatron.rollout.record import RECORDED, group_from_json, read_record
from etr_megatron.rollout.replayable import misfit_of
from etr_megatron.rollout.rounds import draw_groups
from etr_megatron.types import Group

if TYPE_CHECKING:
    from etr_megatron.rollout.dialogues import Dialogues

Timer = Callable[[Literal["rollout", "reward"]], AbstractContextManager[None]]
"""A context manager that adds the duration of its block to the time of a phase."""


@dataclass(frozen=True)
class Rollouts:
    """What a step trains on: `rollout.prompts_per_step` complete, rewarded groups. counts: metrics of how they were sampled."""

    groups: list[Group]
    counts: dict[str, float] = field(default_factory=dict)

    def for_other_ranks(self) -> Rollouts:
        """A copy with empty `Sample.routing`, `text` and `messages`, which only rank 0 uses; tokens are shared, not copied."""
        groups = [replace(group, samples=[copy(sample) for sample in group.samples]) for group in self.groups]
        for sample in (sample for group in groups for sample in group.samples):
            sample.routing, sample.text, sample.messages = array("B"), "", []
        return Rollouts(groups, self.counts)


class Sampler(Protocol):
    """All ranks call all methods. `take`, `cut_off`, `pause` and `resume` are collectives; the others do not
    communicate.

    `take` returns the same on all ranks, except for `Sample.routing`, which can take gigabytes, `text` and `messages`: on ranks
    other than 0 they may be empty.
    """

    def take(self, step: int, timer: Timer, must_stop: MustStop = never) -> Rollouts:
        """The groups of a step. Errors of the engine or the grader are raised on every rank.

        must_stop: whether this rank was asked to stop. A sampler that waits for responses then raises StopAskedError on every
        rank, and keeps everything that was generated.
        """
        ...

    def put_back(self, step: int) -> None:
        """Make the groups of `step`, or their prompts, available to `take` again, because the step will not be trained now.

        Does nothing if that step has not begun.
        """
        ...

    def cut_off(self) -> None:
        """Cut off the requests in flight at servers that share GPUs with training, which comes next."""
        ...

    def pause(self) -> None:
        """Stop generating: when this returns, no request is in flight at the engine, and a weight sync may begin."""
        ...

    def resume(self) -> None:
        """Continue the pending groups after a weight sync."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State for resuming: JSON values and, if there are any, tensors by name under "tensors". Only rank 0's is used."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state. Only rank 0 needs the tensors."""
        ...

    def close(self) -> None:
        """Stop the sampler's threads. Called before the engine is closed."""
        ...


def sampling_of(config: Config, step: int) -> Sampling:
    """Sampling parameters for training. step: the step that responses are requested for."""
    rollout = config.rollout
    return Sampling(
        samples=rollout.samples_per_prompt,
        max_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=config.run.seed,
        step=step,
        routing=config.train.routing_replay,
    )


def replacements(config: Config) -> int:
    """Number of prompts that a step may request to replace left-out groups."""
    rollout = config.rollout
    return int((rollout.max_oversample - 1) * rollout.prompts_per_step)


class RoundSampler:
    """Draws new groups step by step, from an engine in which every rank takes part.

    Dynamic sampling proceeds in rounds; each round requests as many prompts as groups are missing. So a step uses the shortest
    run of prompts that has enough groups that are not flat.
    """

    def __init__(
        self,
        config: Config,
        engine: RolloutEngine,
        cursor: AnyCursor,
        decode: Decode,
        grader: Grader | None,
        dialogues: Dialogues | None = None,
    ) -> None:
        """dialogues: on rank 0, if there is an environment."""
        self._config, self._engine, self._cursor, self._decode, self._grader = config, engine, cursor, decode, grader
        self._dialogues = dialogues
        self._late_calls, self._late_grades = LateSteps("environment"), LateSteps("reward")
        self._before: tuple[int, dict[str, Any]] = (0, {})  # the last step begun, and the cursor's state before it

    def take(self, step: int, timer: Timer, must_stop: MustStop = never) -> Rollouts:
        """See `Sampler.take`. must_stop is checked while waiting for the environment, which may take long. The embedded engine
        does not check it: the ranks finish the turn first."""
        self._before = step, self._cursor.state_dict()
        wanted, dynamic = self._config.rollout.prompts_per_step, self._config.rollout.dynamic_sampling
        limit = max(wanted, min(wanted + replacements(self._config), len(self._cursor)))
        asked: list[Group] = []
        missing = wanted
        while missing and len(asked) < limit:
            count = min(missing, limit - len(asked))
            problems = self._cursor.next(count, after=[group.problem.id for group in asked])
            with timer("rollout"):
                sampling = sampling_of(self._config, step)
                has_turns = self._config.environment.function is not None
                groups = draw_groups(
                    self._engine, problems, sampling, self._dialogues, must_stop, has_turns=has_turns, earlier=asked
                )
            samples = [sample for group in groups for sample in group.samples]
            self._late_calls.check(step, (sample.environment_status for sample in samples))
            with timer("reward"):
                grade_groups(groups, self._decode, self._grader)
            self._late_grades.check(step, (sample.reward_status for sample in samples))
            asked += groups
            missing -= sum(not (dynamic and group.has_zero_variance) for group in groups)
        return chosen(asked, wanted, dynamic=dynamic)

    def put_back(self, step: int) -> None:
        """See `Sampler.put_back`: the prompts will be generated again."""
        if self._before[0] == step:
            self._cursor.load_state_dict(self._before[1])

    def cut_off(self) -> None:
        """Does nothing: between steps no request is in flight."""

    def pause(self) -> None:
        """Does nothing: between steps no request is in flight."""

    def resume(self) -> None:
        """Does nothing: between steps no group is pending."""

    def state_dict(self) -> dict[str, Any]:
        """See `Sampler.state_dict`."""
        return {"cursor": self._cursor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Sampler.load_state_dict`. Raises UserError for a state with pending groups, which only servers can complete."""
        if state.get("in_hand"):
            raise UserError(
                f"the checkpoint holds {len(state['in_hand'])} unfinished groups, which only servers can complete; set "
                "rollout.backend=sglang to resume it"
            )
        self._cursor.load_state_dict(state["cursor"])

    def close(self) -> None:
        """Nothing goes on."""


def chosen(asked: list[Group], wanted: int, *, dynamic: bool) -> Rollouts:
    """The first `wanted` groups that are not flat, filled up with the first flat groups, in the order of their requests.

    Without `dynamic`, no group counts as flat.
    """
    flat = [dynamic and group.has_zero_variance for group in asked]
    kept = [number for number, out in enumerate(flat) if not out][:wanted]
    fill = [number for number, out in enumerate(flat) if out][: wanted - len(kept)]
    counts: dict[str, float] = {}
    if dynamic:
        counts = {"groups_asked": len(asked), "groups_dropped": sum(flat), "groups_filled": len(fill)}
    return Rollouts([asked[number] for number in sorted(kept + fill)], counts)


class ReplaySampler:
    """Replays the groups of a recorded run. It needs no engine and draws no prompts."""

    def __init__(self, config: Config, cursor: AnyCursor) -> None:
        self._config, self._cursor = config, cursor
        self._folder = Path(config.rollout.replay or "") / RECORDED

    def take(self, step: int, timer: Timer, must_stop: MustStop = never) -> Rollouts:
        """See `Sampler.take`. Raises UserError when the step was not recorded or does not match the config."""
        with timer("rollout"):
            return on_rank0(lambda: self._read(step), long=True, share=Rollouts.for_other_ranks)

    def _read(self, step: int) -> Rollouts:
        found, counts = read_record(self._folder, step)
        if misfit := misfit_of(self._folder, step, found, self._config):
            raise UserError(misfit)
        return Rollouts([group_from_json(group) for group in found], counts)

    def put_back(self, step: int) -> None:
        """Nothing to do: the record can be read again."""

    def cut_off(self) -> None:
        """There is no engine."""

    def pause(self) -> None:
        """There is no engine."""

    def resume(self) -> None:
        """There is no engine."""

    def state_dict(self) -> dict[str, Any]:
        """See `Sampler.state_dict`."""
        return {"cursor": self._cursor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Sampler.load_state_dict`."""
        self._cursor.load_state_dict(state["cursor"])

    def close(self) -> None:
        """Nothing goes on."""
