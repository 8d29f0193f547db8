"""Dialogues with an engine in which every rank takes part: every round generates one turn of all open responses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout.collect import generate_groups
from etr_megatron.rollout.engine import STOP_POLL_S, GenerationOutput, MustStop, RolloutEngine, Sampling, never
from etr_megatron.rollout.pending_group import extend
from etr_megatron.rollout.rank0 import of_rank0, on_rank0, on_rank0_until_stopped
from etr_megatron.types import EnvironmentStatus, FinishReason, Group, Problem, Sample, append_reply_tokens

if TYPE_CHECKING:
    from etr_megatron.rollout.dialogues import Dialogues

_OWNER = "rounds"


@dataclass(frozen=True)
class _Replied:
    """The effect of the environment's reply on a sample: its finish reason, the appended tokens, the status of the call."""

    finish_reason: FinishReason
    inserted: list[int]
    status: EnvironmentStatus | None


@dataclass(frozen=True)
class _Open:
    """A response that has not ended. limit: most tokens of the whole response."""

    group: Group
    sample: Sample
    limit: int


def draw_groups(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    sampling: Sampling,
    dialogues: Dialogues | None,
    must_stop: MustStop = never,
    *,
    has_turns: bool,
    earlier: Sequence[Group] = (),
) -> list[Group]:
    """Call `generate_groups` and, if there is an environment (`has_turns`), `draw_further_turns`."""
    groups = generate_groups(engine, problems, sampling, must_stop)
    if has_turns:
        draw_further_turns(engine, groups, sampling, dialogues, must_stop, earlier=earlier)
    return groups


def draw_further_turns(
    engine: RolloutEngine,
    groups: Sequence[Group],
    sampling: Sampling,
    dialogues: Dialogues | None,
    must_stop: MustStop = never,
    *,
    earlier: Sequence[Group] = (),
) -> None:
    """Continue responses whose first turn has been generated until all have ended (in place; the caller owns the groups).

    A collective; `dialogues` is None on ranks other than 0. sampling: that of the first turns. If the engine returns responses
    on rank 0 alone, the responses on other ranks hold only the replies. earlier: groups that the step has generated before.
    Raises what `engine.generate` raises, StopAskedError when `must_stop()` is true on any rank, and UngradedError when all
    calls of the environment failed, or failed calls ended all responses of these groups and the earlier ones.
    """
    limits = sampling.max_tokens_of([group.problem for group in groups])
    opened = [_Open(group, sample, limit) for group, limit in zip(groups, limits, strict=True) for sample in group.samples]
    for turn in itertools.count(2):
        if not opened:
            break
        opened = _go_on(opened, dialogues, must_stop)
        _draw(engine, opened, sampling, turn, must_stop)
    responses = [sample for group in (*earlier, *groups) for sample in group.samples]
    on_rank0(lambda: of_rank0(dialogues).report(_OWNER, responses))


def _go_on(opened: Sequence[_Open], dialogues: Dialogues | None, must_stop: MustStop) -> list[_Open]:
    """Append the environment's replies to responses whose turn has ended (in place); return those that have another turn."""
    replied = on_rank0_until_stopped(lambda anywhere: _replies(of_rank0(dialogues), opened, anywhere), must_stop)
    if dialogues is None:
        for one, reply in zip(opened, replied, strict=True):
            _apply(one.sample, reply)
    return [one for one, reply in zip(opened, replied, strict=True) if reply is not None and reply.finish_reason == "abort"]


def _draw(engine: RolloutEngine, opened: Sequence[_Open], sampling: Sampling, turn: int, must_stop: MustStop) -> None:
    """Generate turn `turn` of all these responses. The seed of each depends on its problem's id, sample index and turn."""
    if not opened:
        return
    problems = [
        replace(
            one.group.problem,
            id=f"{one.group.problem.id}/{one.sample.index}/{turn}",
            prompt_ids=one.group.problem.prompt_ids + one.sample.response_ids,
        )
        for one in opened
    ]
    left = tuple(one.limit - len(one.sample.response_ids) for one in opened)
    names = tuple(f"{one.group.problem.id}/{one.sample.index}" for one in opened)
    drawn = engine.generate(problems, replace(sampling, samples=1, max_tokens=left, continued=names), must_stop)
    for one, (new,) in zip(opened, drawn, strict=True):
        ids, logprobs = new.response_ids, new.rollout_logprobs
        extend(one.sample, GenerationOutput(0, ids, logprobs, new.finish_reason, new.weight_version, routing=new.routing))


def _replies(dialogues: Dialogues, opened: Sequence[_Open], must_stop: MustStop) -> list[_Replied | None]:
    """Get replies for responses whose turn has been generated, and append them (in place). Returns the effect on each response;
    None for one that had already ended."""
    before = [len(one.sample.response_ids) for one in opened]
    asked = [one.sample.finish_reason == "stop" for one in opened]
    for one, is_asked in zip(opened, asked, strict=True):
        if one.sample.finish_reason != "abort":  # else the engine has given it up
            dialogues.end_turn(one.sample)
        if is_asked:
            dialogues.submit(_OWNER, one.group, one.sample, one.limit)
    missing = sum(asked)
    while missing:
        if must_stop():
            dialogues.forget(_OWNER)
            raise StopAskedError("told to stop (SIGTERM) while the environment was asked for replies")
        missing -= len(dialogues.ended(_OWNER, STOP_POLL_S))
    samples = (one.sample for one in opened)
    return [
        _Replied(sample.finish_reason, sample.response_ids[size:].tolist(), sample.environment_status) if is_asked else None
        for sample, size, is_asked in zip(samples, before, asked, strict=True)
    ]


def _apply(sample: Sample, reply: _Replied | None) -> None:
    """Do on this rank what rank 0 did to its copy."""
    if reply is None:
        return
    sample.finish_reason, sample.environment_status = reply.finish_reason, reply.status
    if reply.inserted:
        append_reply_tokens(sample, reply.inserted)
