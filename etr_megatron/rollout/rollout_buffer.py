"""The pending groups of an engine that generates while the ranks train: dynamic sampling, partial rollouts, staleness.

"Sampling" in docs/rollout.md lists the states of a group, and says why no request spans a weight sync.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from etr_megatron.config import Config
from etr_megatron.data import AnyCursor
from etr_megatron.errors import UserError
from etr_megatron.platform.background_loop import BackgroundLoop
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.reward import Grade
from etr_megatron.rollout.collect import Decode, LateSteps, UngradedError, all_failed, fill_in, report_errors
from etr_megatron.rollout.engine import (
    STOP_POLL_S,
    EngineGoneError,
    GenerationOutput,
    GenerationRequest,
    MustStop,
    NeedsSyncError,
    RefusedError,
    StreamingEngine,
    never,
)
from etr_megatron.rollout.grading import Grading, StreamingGrader
from etr_megatron.rollout.pending_group import PendingGroup, extend, oldest_version, pack, summed_ages, unpack
from etr_megatron.rollout.sampler import Rollouts, Timer, replacements, sampling_of
from etr_megatron.types import Group, Sample

if TYPE_CHECKING:
    from etr_megatron.rollout.dialogues import Dialogues

logger = logging.getLogger(__name__)

_GLANCE_S = 0.01
"""Longest wait, in seconds, for the engine while replies of the environment or grades are pending too, because their workers
get their next calls only between two waits. Also the longest wait of the background loop, so that it can be stopped quickly."""

_OF_ENGINE = (EngineGoneError, NeedsSyncError, RefusedError)


class RolloutBuffer:
    """The groups that were requested and not yet trained on, in the order of their requests; on rank 0 only."""

    def __init__(
        self,
        config: Config,
        engine: StreamingEngine,
        cursor: AnyCursor,
        decode: Decode,
        grader: StreamingGrader,
        dialogues: Dialogues | None = None,
    ) -> None:
        self._config, self._engine, self._cursor, self._decode = config, engine, cursor, decode
        self._grading, self._dialogues = Grading(grader), dialogues
        self._replying: dict[int, tuple[PendingGroup, Sample]] = {}  # waiting for the environment, by id(sample)
        # While the ranks train, a background thread takes responses, continues dialogues and has responses graded. All methods
        # below that read or change the groups stop it first.
        self._background = BackgroundLoop(self._go_on_alone, "responses")
        self._groups: list[PendingGroup] = []
        self._taken: tuple[int, list[PendingGroup]] = (0, [])  # the last step, and its groups
        self._keys = itertools.count()
        self._under_way: dict[int, tuple[PendingGroup, Sample]] = {}
        self._asked_for = 0  # the step that prompts are requested for; below, the ids of its problems
        self._asked_ids: list[str] = []
        self._counts: Counter[str] = Counter()
        self._grades: list[tuple[Grade, str]] = []  # that no step has reported yet
        self._late_calls, self._late_grades = LateSteps("environment"), LateSteps("reward")
        self._given_up = ""  # why the last group was given up

    def take(self, step: int, timer: Timer, must_stop: MustStop = never) -> Rollouts:
        """See `Sampler.take`."""
        rollout = self._config.rollout
        self._background.stop()
        # Colocated servers generate nothing while the ranks train.
        ahead = 0 if self._config.sglang.placement == "colocated" else rollout.max_staleness * rollout.prompts_per_step
        wanted = max(ahead, int((rollout.max_oversample if rollout.partial else 1) * rollout.prompts_per_step))
        # Those of a checkpoint, and those whose grading has failed.
        self._grading.submit([(held, sample) for held in self._groups for sample in held.group.samples if sample.has_ended])
        while True:
            self._ask(step, wanted)
            self._refuse_if_too_few()
            if self._is_enough() or all(held.is_rewarded for held in self._groups):
                break
            if must_stop():
                raise StopAskedError(f"told to stop (SIGTERM) during the rollout of step {step}")
            with timer("rollout" if any(held.missing for held in self._groups) else "reward"):
                self._go_on(STOP_POLL_S)
        try:
            # Responses graded ahead may leave few grades to a step. Fewer than a group's do not show that nothing can be
            # graded; they count with the next step's.
            if self._has_enough_grades:
                grades, self._grades = self._grades, []
                report_errors(grades)
                self._late_grades.check(step, (grade.status for grade, _ in grades))
            else:
                self._late_grades.check(step, ())
            if self._dialogues is not None:
                complete = _complete(self._groups)
                self._dialogues.report(self, complete)
                self._late_calls.check(step, (sample.environment_status for sample in complete))
        except UngradedError:
            _forget_failures(self._groups)
            raise
        taken = self._choose(step)
        if step < self._config.run.steps:
            self._ask(step + 1, ahead)
        self._start_background()
        return taken

    def put_back(self, step: int) -> None:
        """See `Sampler.put_back`: the groups are pending again, complete and rewarded."""
        with suppress(Exception):  # the run is already ending with another error, and must still save its checkpoint
            self._background.stop()
        if self._taken[0] == step:
            self._groups = self._taken[1] + self._groups

    def cut_off(self) -> None:
        """See `Sampler.cut_off`. Responses of pending groups keep their tokens, and are continued after the weight sync.

        Without partial rollouts, only responses of groups that were given up can be in flight.
        """
        self._interrupt(abort=True)

    def pause(self) -> None:
        """See `Sampler.pause`. With partial rollouts, responses are cut off; otherwise this waits for them.

        A weight sync follows the training of a step. The groups of that step (gigabytes with routing) are freed here, before
        new ones arrive.
        """
        self._taken = 0, []
        self._interrupt(abort=self._config.rollout.partial)

    def _interrupt(self, *, abort: bool) -> None:
        with suppress(*_OF_ENGINE):  # these errors recur when the requests are submitted again
            self._background.stop()
        self._accept(self._engine.stop(abort=abort))
        self._under_way.clear()  # requests that an engine without servers could not answer are submitted again

    def resume(self) -> None:
        """See `Sampler.resume`. Samples with tokens too old for the next step are redrawn."""
        oldest = self._engine.weight_version - self._config.rollout.max_staleness
        for held in self._groups:
            held.places.clear()  # the weight sync emptied the servers' caches
        self._counts["groups_redone"] += sum(held.redo_older_than(oldest) for held in self._groups)
        self._submit(self._groups)
        self._start_background()

    def state_dict(self) -> dict[str, Any]:
        """All pending groups. After a restart, tokens that the engine had not returned are generated again, and replies of the
        environment and rewards are requested again."""
        with self._background.held():
            groups = self._groups
            broken = self._dialogues is not None and self._dialogues.is_broken(self, _complete(groups))
            if broken or (self._has_enough_grades and all_failed(self._grades)):
                # These failures may end the run in the next step. A checkpoint saved before it must not hold them.
                groups = deepcopy(groups)
                _forget_failures(groups)
            packed, tensors = pack(groups)
            return {
                "in_hand": packed,
                "tensors": tensors,
                "asked_for": self._asked_for,
                "asked_ids": self._asked_ids[:],
                "counts": dict(self._counts),
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, which may be empty if the run had no pending groups.

        Raises UserError if responses wait for a reply, and no environment is configured.
        """
        self._groups = unpack(state.get("in_hand", []), state.get("tensors", {}))
        waits = sum(sample.finish_reason == "turn" for held in self._groups for sample in held.group.samples)
        if waits and self._dialogues is None:
            raise UserError(
                f"the checkpoint holds {waits} responses that wait for a reply of an environment; set environment.function to "
                "that of the run"
            )
        self._asked_for, self._asked_ids = state.get("asked_for", 0), list(state.get("asked_ids", []))
        self._counts = Counter(state.get("counts", {}))

    def close(self) -> None:
        """Stop the background thread."""
        with suppress(Exception):  # the run has ended
            self._background.stop()

    @property
    def _has_enough_grades(self) -> bool:
        return len(self._grades) >= self._config.rollout.samples_per_prompt

    def _start_background(self) -> None:
        if self._config.rollout.max_staleness:
            self._background.start()

    def _go_on_alone(self) -> bool:
        """One iteration of the background loop; returns whether requests, replies or grades are pending."""
        self._go_on(_GLANCE_S)
        return bool(self._under_way or self._replying or self._grading.is_pending)

    def _go_on(self, timeout_s: float) -> None:
        """Take the responses, replies and grades that have arrived since the last call; submit the next turns of dialogues, and
        have responses graded that have ended. Waits for at least one arrival, up to `timeout_s`."""
        glance_s, is_grading = min(timeout_s, _GLANCE_S), self._grading.is_pending
        if self._under_way or not (self._replying or is_grading):
            self._accept(self._engine.wait(glance_s if self._replying or is_grading else timeout_s))
            timeout_s = glance_s = 0.0
        if self._dialogues is not None and self._replying:
            self._accept_replies(self._dialogues.ended(self, glance_s if is_grading else timeout_s))
            timeout_s = 0.0
        self._accept_grades(timeout_s)

    def _accept_replies(self, ended: Iterable[Sample]) -> None:
        replied = [self._replying.pop(id(sample)) for sample in ended]
        still_there = [(held, sample) for held, sample in replied if self._has(held, sample)]
        for held, sample in still_there:
            self._finish(held, sample)
        self._continue([(held, sample) for held, sample in still_there if sample.finish_reason == "abort"])

    def _accept_grades(self, timeout_s: float) -> None:
        """Reward samples and, with dynamic sampling, leave out complete groups without a learning signal."""
        for held, sample, grade in self._grading.poll(timeout_s):
            if self._has(held, sample):
                fill_in(sample, grade)
                self._grades.append((grade, held.group.problem.id))
                held.is_left_out = self._config.rollout.dynamic_sampling and held.is_rewarded and held.group.has_zero_variance

    def _has(self, held: PendingGroup, sample: Sample) -> bool:
        """Whether the sample is still needed: its group was not given up, and the sample was not replaced by an empty one."""
        return any(one is held for one in self._groups) and held.group.samples[sample.index] is sample

    def _ask(self, step: int, wanted: int) -> None:
        """Request new prompts until `wanted` groups are pending, within the step's limits. Left-out groups do not count."""
        if step != self._asked_for:
            self._asked_for = step
            self._asked_ids = [held.group.problem.id for held in self._groups if held.step == step]
        left_out = sum(held.is_left_out for held in self._groups)
        missing = wanted - len(self._groups) + min(left_out, replacements(self._config))
        # If there are fewer problems than a step needs, the cursor raises an error that says so.
        there_are = max(len(self._cursor), self._config.rollout.prompts_per_step)
        count = min(missing, there_are - len(self._asked_ids))
        if count <= 0:
            return
        problems = self._cursor.next(count, after=self._asked_ids)
        self._asked_ids += [problem.id for problem in problems]
        samples, version = self._config.rollout.samples_per_prompt, self._engine.weight_version
        new = [PendingGroup.new(problem, step=step, samples=samples, weight_version=version) for problem in problems]
        self._counts["groups_asked"] += len(new)
        self._groups += new
        self._submit(new)

    def _submit(self, groups: Sequence[PendingGroup]) -> None:
        self._continue([(held, sample) for held in groups for sample in held.missing])

    def _continue(self, missing: Iterable[tuple[PendingGroup, Sample]]) -> None:
        """Submit these samples to the engine, or to the environment if their turn has ended."""
        requests = []
        for held, sample in missing:
            if sample.finish_reason == "turn":
                self._have_replied(held, sample)
                continue
            key = next(self._keys)
            self._under_way[key] = held, sample
            sampling = sampling_of(self._config, held.step)
            drawn, begin = sample.response_ids[:], sample.turn_begin
            cached_at = held.places.get(sample.index)
            requests.append(GenerationRequest(key, held.group.problem, sample.index, sampling, drawn, begin, cached_at))
        if requests:
            self._engine.submit(requests)

    def _have_replied(self, held: PendingGroup, sample: Sample) -> None:
        if self._dialogues is not None and id(sample) not in self._replying:
            self._replying[id(sample)] = held, sample
            self._dialogues.submit(self, held.group, sample, self._config.rollout.max_response_tokens)

    def _accept(self, outputs: Iterable[GenerationOutput]) -> None:
        for one in outputs:
            held, sample = self._under_way.pop(one.key)
            if one.given_up:
                self._give_up(held, one.given_up)
                continue
            extend(sample, one)
            held.places[sample.index] = one.place
            if self._dialogues is not None and sample.finish_reason != "abort":
                self._dialogues.end_turn(sample)
                if sample.finish_reason == "stop":
                    sample.finish_reason = "turn"
                    if self._has(held, sample):
                        self._have_replied(held, sample)
            self._finish(held, sample)

    def _finish(self, held: PendingGroup, sample: Sample) -> None:
        """Fill in the text of a response that has ended, and have it graded. As a reward may be slow (a judge model, a test
        suite), this does not wait for the rest of the group."""
        if sample.has_ended and self._has(held, sample):
            sample.text = self._decode(sample.response_ids.tolist())
            self._grading.submit([(held, sample)])

    def _give_up(self, group: PendingGroup, why: str) -> None:
        """Drop the whole group, because only complete groups are trained on; its pending replies will be ignored."""
        left = [held for held in self._groups if held is not group]
        if len(left) < len(self._groups):
            logger.warning("group %s is given up: %s", group.group.id, why)
            self._groups, self._given_up = left, why
            self._counts["groups_given_up"] += 1

    def _refuse_if_too_few(self) -> None:
        """Raises RefusedError when a step has given up more groups than it trains on, or has too few groups left after that."""
        wanted, given_up = self._config.rollout.prompts_per_step, self._counts["groups_given_up"]
        if given_up > wanted or (given_up and len(self._groups) < wanted):
            del self._counts["groups_given_up"]  # a restart after a fix counts from zero
            raise RefusedError(
                f"a step of {wanted} groups had to give up {given_up}; the reason for the last: {self._given_up}"
            )

    def _is_enough(self) -> bool:
        """Whether enough groups are ready. Also waits for redone groups to be complete, because a long response might otherwise
        be redone forever, and for grades of complete groups that would be too old for the next step."""
        if sum(held.is_ready for held in self._groups) < self._config.rollout.prompts_per_step:
            return False
        oldest = self._engine.weight_version - self._config.rollout.max_staleness
        return not any(
            held.is_redone if held.missing else not held.is_rewarded and held.oldest_version <= oldest for held in self._groups
        )

    def _choose(self, step: int) -> Rollouts:
        """Take the ready groups with the oldest tokens, fill up with left-out groups, and drop the other left-out groups."""
        wanted = self._config.rollout.prompts_per_step
        ready = sorted((held for held in self._groups if held.is_ready), key=lambda held: held.oldest_version)[:wanted]
        left_out = [held for held in self._groups if held.is_left_out]
        fill = left_out[: wanted - len(ready)]
        taken = {id(held) for held in (*ready, *fill)}
        self._taken = step, [held for held in self._groups if id(held) in taken]
        groups = [held.group for held in self._taken[1]]
        self._groups = [held for held in self._groups if id(held) not in taken and not held.is_left_out]
        self._counts["groups_dropped"], self._counts["groups_filled"] = len(left_out), len(fill)
        counts = self._counts_of(groups)
        self._counts.clear()
        return Rollouts(groups, counts)

    def _counts_of(self, groups: Sequence[Group]) -> dict[str, float]:
        """The step's metrics. Raises RuntimeError if a token is too old, which would be a bug of this class."""
        rollout, version = self._config.rollout, self._engine.weight_version
        samples = [sample for group in groups for sample in group.samples]
        tokens = sum(sample.num_generated for sample in samples)
        ages = sum(summed_ages(sample, version) for sample in samples)
        oldest = version - min(oldest_version(sample) for sample in samples)
        if oldest > rollout.max_staleness:
            raise RuntimeError(f"a token is {oldest} weight syncs old, more than rollout.max_staleness={rollout.max_staleness}")
        names = ["groups_asked", "groups_dropped", "groups_filled"] if rollout.dynamic_sampling else []
        counts: dict[str, float] = {name: self._counts[name] for name in names}
        if rollout.max_staleness:
            counts |= {"staleness_mean": ages / max(tokens, 1), "staleness_max": oldest}
            counts |= {"groups_redone": self._counts["groups_redone"], "groups_pending": len(self._groups)}
        if self._counts["groups_given_up"]:
            counts["groups_given_up"] = self._counts["groups_given_up"]
        if rollout.partial:
            counts["samples_continued"] = sum(bool(sample.weight_versions) for sample in samples)
        return counts


def _complete(groups: Iterable[PendingGroup]) -> list[Sample]:
    """The responses of complete groups."""
    return [sample for held in groups if not held.missing for sample in held.group.samples]


def _forget_failures(groups: Iterable[PendingGroup]) -> None:
    """Reset failed grades and failed environment calls (in place), so that both are repeated after a fix."""
    for held in groups:
        failed = [one for one in held.group.samples if one.reward_status not in ("ok", None) or one.call_failed]
        for sample in failed:
            sample.reward = sample.reward_status = None
            if sample.call_failed:
                sample.finish_reason, sample.environment_status = "turn", None
        held.is_left_out = held.is_left_out and not failed
