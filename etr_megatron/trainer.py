"""The training loop: prompts become rollouts, rollouts become rewarded groups, groups become a packed batch, the batch becomes
Megatron steps under an elastic trust region, and the new weights go back to the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from etr_megatron import checkpoint
from etr_megatron.batching import build_batch, minibatches, routing_of, sequences_of, why_untrained
from etr_megatron.config import Config
from etr_megatron.errors import RequeueError
from etr_megatron.evaluation import HeldOut, best_steps, evaluate, evaluation_metrics
from etr_megatron.metrics import check_logprob_gap, generated_by_version, rollout_metrics, step_metrics, training_speed
from etr_megatron.observe import MetricsRow, Recorder, RunDirectory, Stopwatch, profiled
from etr_megatron.platform.files import path_errors
from etr_megatron.platform.phases import PhaseBarriers, StopAskedError
from etr_megatron.platform.preemption import StopRequest
from etr_megatron.policy import Policy, PolicyBatch, StepRouting, Update
from etr_megatron.rollout import (
    EngineGoneError,
    NeedsSyncError,
    OtherModelError,
    RefusedError,
    RolloutEngine,
    Rollouts,
    Sampler,
    UngradedError,
)
from etr_megatron.rollout.collect import Decode, Grader
from etr_megatron.rollout.dialogues import Dialogues
from etr_megatron.rollout.rank0 import on_rank0
from etr_megatron.rollout.record import RolloutProgress, read_reached, write_reached, write_record
from etr_megatron.types import Group
from etr_megatron.weights.transport import SyncError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_SERVER_RESTARTS = 32
"""Maximum restarts of servers to generate the same responses. A prompt that kills servers kills those that it was
spread over, and at most two more."""

IDLE_BARRIER_TIMEOUT_S = 60.0
"""Timeout of a barrier while no rank is busy."""


class Trainer:
    """One run on one rank; every rank calls the same methods. `grader`, `dialogues` (if there is an environment) and `recorder`
    are None on ranks other than 0. `engine` is None in a replay."""

    def __init__(
        self,
        config: Config,
        *,
        policy: Policy,
        engine: RolloutEngine | None,
        sampler: Sampler,
        held_out: HeldOut,
        decode: Decode,
        directory: RunDirectory,
        grader: Grader | None,
        dialogues: Dialogues | None = None,
        recorder: Callable[[int], Recorder] | None,
        stop_request: StopRequest,
        phases: PhaseBarriers,
    ) -> None:
        """stop_request: this rank's, inside its `on_sigterm` block. phases: barriers, which check the stop requests."""
        self.config, self.policy, self.engine, self.sampler = config, policy, engine, sampler
        self._held_out, self._decode, self._directory, self._grader = held_out, decode, directory, grader
        self._dialogues = dialogues
        self._open_recorder = recorder
        self._recorder: Recorder | None = None
        self._stop_request, self._phases = stop_request, phases
        self._saver = checkpoint.Saver(config, phases)
        self._watch = Stopwatch()
        self.step = 0
        self.trained = 0
        """The last completed step."""
        self.has_begun = False
        """Whether the run has been resumed or begun anew: its outputs are those of this start."""
        self._version = 0  # the step that made the policy's weights; below `trained` in a rollout-only run
        self._gate = engine is not None
        self._unrecorded: tuple[dict[str, Any], list[Group]] | None = None

    def run(self) -> None:
        """Run from the newest checkpoint, or from the start, to `run.steps`.

        Saves a checkpoint of the trained weights and the sampler's state before it raises:
        - RequeueError: the engine is gone, or SIGTERM asks a rank to stop.
        - RefusedError: the engine rejects a request as invalid.
        - UngradedError, OtherModelError: rewards or the policy's own responses are not available. Saved if a step was trained.
        - SyncError: a weight sync failed. Saved if a step was trained and all ranks are alive.
        """
        try:
            self._resume()
        except StopAskedError as error:  # there is nothing to save yet
            raise RequeueError(f"{error}: start again with the same command to continue") from error
        try:
            self._run_rollout_only() if self.config.rollout.only else self._run_steps()
        except (EngineGoneError, StopAskedError) as error:
            self._save_trained_state()
            raise RequeueError(f"{error}; step {self.step} is saved: start again with the same command to continue") from error
        except RefusedError:  # a restart would not help
            self._save_trained_state()
            raise
        except (UngradedError, OtherModelError):
            if self.trained:  # else the run starts from the beginning after the fix
                self._save_trained_state()
            raise
        except SyncError:
            if self.trained and self._all_ranks_alive():
                self._save_trained_state()
            raise

    def close(self) -> None:
        """After `run`, also if it raised: wait for a checkpoint that is being written. Not a collective."""
        self._saver.close()

    def _all_ranks_alive(self) -> bool:
        """Whether all ranks can still save after a failed weight sync, which may have lost a rank or left one hanging."""
        self._phases.ignore_stop_requests()
        try:
            self._phases.barrier("checkpoint after a failed weight sync", within_s=IDLE_BARRIER_TIMEOUT_S)
        except (TimeoutError, ConnectionError) as error:
            logger.warning("training since the last checkpoint is lost: %s", error)
            return False
        return True

    def _save_trained_state(self) -> None:
        self._phases.ignore_stop_requests()
        if self.step > self.trained:
            self.sampler.put_back(self.step)
        self.step = self.trained
        if self.config.rollout.only:  # the record is the only output
            return
        if self._unrecorded is not None:
            self._record(*self._unrecorded)
        self._saver.finish(only_warn=True)  # if it has failed, this state may find room
        if self._latest_checkpoint() != self.step:
            self._save()
            self._saver.finish()

    def _run_steps(self) -> None:
        self._sync()
        start = {f"{key}_start": value for key, value in self._evaluate().items()} if self.step == 0 else {}
        self._run_missed_evaluation()
        self._watch.lap()
        while self.step < self.config.run.steps:
            self.step += 1
            self._run_step(start)
            start = {}
        self._saver.finish()

    def _run_step(self, start: dict[str, Any]) -> None:
        """Run one step. start: metrics known before the step, which are added to its row.

        A separate method, so that its groups are freed before those of the next step arrive: with routing they take gigabytes.
        """
        config = self.config
        rollouts, engine = self._roll_out(), self._engine_metrics()
        batch, updates = self._train(rollouts.groups)
        row = step_metrics(self.step, rollouts.groups, batch, updates, config) | rollouts.counts | engine | start
        self._write_record(rollouts, batch)
        self.trained = self._version = self.step
        self._unrecorded = row, rollouts.groups
        self._sync()
        if self._is_evaluated(self.step):
            row |= self._evaluate()
        self._record(row, rollouts.groups)
        if config.checkpoint.every and (self.step % config.checkpoint.every == 0 or self.step == config.run.steps):
            self._save()

    def _run_rollout_only(self) -> None:
        """Rollouts and rewards of the remaining steps, all under the current weights."""
        self._sync()
        self._watch.lap()
        while self.step < self.config.run.steps:
            self.step += 1
            rollouts, engine = self._roll_out(), self._engine_metrics()
            self._write_record(rollouts)
            row = rollout_metrics(self.step, rollouts.groups, self.config) | rollouts.counts | engine
            self._record(row, rollouts.groups)
            if self._recorder is not None:
                write_reached(
                    self._directory.reached_file, RolloutProgress(self._version, self.step, self.sampler.state_dict())
                )
            self.trained = self.step

    def _barrier(self, phase: str) -> None:
        """Wait for the other ranks before the phase. Raises, on all ranks, the error of a checkpoint that is being written."""
        self._phases.barrier(phase)
        self._saver.check()

    def _roll_out(self) -> Rollouts:
        self._barrier(f"rollout of step {self.step}")
        return self._with_servers(lambda: self.sampler.take(self.step, self._watch.phase, self._stop_request))

    def _engine_metrics(self) -> dict[str, float]:
        """The engine's metrics. Call it right after a step's rollout, because the next sync brings failed servers back."""
        return {} if self.engine is None else self.engine.metrics()

    def _with_servers(self, generate: Callable[[], T]) -> T:
        """Call `generate`; if servers have to be restarted for it, sync the same weights and call it again.

        Raises EngineGoneError if `generate` still fails after servers were brought back `MAX_SERVER_RESTARTS` times.
        """
        restarts = 0
        while True:
            try:
                return generate()
            except NeedsSyncError as error:
                if restarts == MAX_SERVER_RESTARTS:
                    raise EngineGoneError(
                        f"{error}; servers were brought back {MAX_SERVER_RESTARTS} times for the same responses and died again "
                        "each time: see their logs in servers/ of the run's directory, and the problems in suspicions.json "
                        "there"
                    ) from error
                restarts += 1
                if self._recorder is not None:
                    logger.warning("%s", error)
                self._sync()

    def _train(self, groups: list[Group]) -> tuple[PolicyBatch, list[Update]]:
        """Compute the old (and reference) log-probs before the first update, if they are needed, then run the updates."""
        with self._watch.phase("train"):
            self._barrier(f"training of step {self.step}")
            if self.engine is not None:
                self.sampler.cut_off()
                self.engine.release()
            self.policy.reload()
            sequences, has_reference = sequences_of(groups), self.policy.has_reference
            routing = self._routing(groups)
            by_engine = self.config.objective.old_logp == "engine"
            old = reference = None
            if self._gate or not by_engine:
                with self._watch.part("logprobs"):
                    old = self.policy.logprobs(sequences, routing=routing)
            if has_reference:
                with self._watch.part("reference"):
                    reference = self.policy.logprobs(sequences, reference=True)
            batch = build_batch(groups, self.config, self.step, old=old, reference=reference, routing=routing)
            if self._gate:
                self._gate = not check_logprob_gap(batch, self.config, generated_by_version(groups, self.step - 1))
            if by_engine:
                batch = batch.relative_to_engine()
            if self._recorder is not None and not batch.weight.any():
                logger.warning("step %d: nothing to train on, as all responses were %s", self.step, why_untrained(groups))
            updates: list[Update] = []
            for part in minibatches(batch, groups, self.config) * self.config.train.epochs:
                with self._watch.part("update"), nullcontext() if updates else self._profiled():
                    updates.append(self.policy.update(part))
            return batch, updates

    def _profiled(self) -> AbstractContextManager[Any]:
        """Context manager for a step's first update. It profiles the update if the step is `observe.profile_step`."""
        layout = self.policy.layout
        if self.step != self.config.observe.profile_step or layout.dp_rank != 0:
            return nullcontext()
        return profiled(self._directory.profiles / f"step_{self.step:06}_rank_{layout.rank}.json.gz")

    def _routing(self, groups: list[Group]) -> StepRouting | None:
        """The experts that the engine chose, if routing replay is on."""
        experts, layers = self.policy.arch.experts, len(self.policy.arch.expert_layers)
        if not self.config.train.routing_replay or experts is None:
            return None
        return on_rank0(
            lambda: StepRouting.of(routing_of(groups, experts, layers)), long=True, share=StepRouting.without_chosen
        )

    def _sync(self) -> None:
        """Send the policy's weights to the engine; requests in flight are paused or finished first."""
        if self.engine is None:
            return
        with self._watch.phase("sync"):
            self._barrier(f"weight sync of step {self.step}")
            self.sampler.pause()
            self.policy.offload()
            self.engine.update_weights(self.policy.export(), version=self._version, must_stop=self._stop_request)
            self.sampler.resume()

    def _evaluate(self) -> dict[str, Any]:
        """Evaluation metrics under the engine's current weights, on rank 0; empty if evaluation is off."""
        if self.engine is None or not self._held_out.sets or not self.config.eval.every:
            return {}
        self._barrier(f"evaluation after step {self.step}")
        sets = evaluate(
            self.engine,
            self._held_out,
            self.config,
            decode=self._decode,
            grader=self._grader,
            dialogues=self._dialogues,
            must_stop=self._stop_request,
            with_servers=self._with_servers,
        )
        if self._recorder is None:
            return {}
        observe = self.config.observe
        if observe.rollouts_every:
            shown = [group for groups in sets.values() for group in groups[: observe.rollouts_groups]]
            self._directory.save_evaluation(self.step, shown)
        return evaluation_metrics(sets, self.config)

    def _is_evaluated(self, step: int) -> bool:
        every = self.config.eval.every
        return bool(every) and (step % every == 0 or step == self.config.run.steps)

    def _run_missed_evaluation(self) -> None:
        """Evaluate after the resumed step if its row shows that the run stopped before that step's evaluation."""
        if self.step == 0 or not self._is_evaluated(self.step):
            return
        if not on_rank0(lambda: self._recorder is not None and self._recorder.lacks(self.step, "eval_accuracy")):
            return
        found = self._evaluate()
        if found and self._recorder is not None:
            self._recorder.complete(self.step, found)

    def _record(self, row: dict[str, Any], groups: list[Group]) -> None:
        self._unrecorded = None
        times = self._watch.lap()
        if self._recorder is None:
            return
        tokens = sum(sample.num_generated for group in groups for sample in group.samples)
        speed = {}
        if not self.config.rollout.only:
            speed = training_speed(self.policy, groups, self.config, times["time_train"])
        row = {**row, **times, **self._saver.times(), **speed, "tokens_per_s": tokens / times["time_step"]}
        self._recorder.record(cast(MetricsRow, row))  # the keys are checked when the row is appended
        self._directory.write_status("running", self.step, self.config.run.steps)
        observe = self.config.observe
        if observe.rollouts_every and self.step % observe.rollouts_every == 0:
            self._directory.save_rollouts(self.step, groups[: observe.rollouts_groups])

    def _write_record(self, rollouts: Rollouts, batch: PolicyBatch | None = None) -> None:
        """Record the step's groups, with the trainer's log-probs if there are any."""
        config = self.config.rollout
        if self._recorder is not None and (config.record or config.only):
            computed = () if batch is None or batch.old_entropy is None else batch.old_logp
            old = (logp.tolist() for logp in computed) if computed else None
            write_record(self._directory.recorded, self.step, rollouts.groups, rollouts.counts, old)

    def _save(self) -> None:
        self._barrier(f"checkpoint of step {self.step}")
        self._saver.finish()  # its step may be one of the best
        best = self._best_saved() if self._recorder is not None else ()
        self._saver.save(self._directory.checkpoints, self.step, self.policy, self.sampler.state_dict(), best)

    def _best_saved(self) -> list[int]:
        """The best steps, among this step and those with a checkpoint, whose checkpoints `checkpoint.keep_best` keeps."""
        config = self.config.checkpoint
        if not config.keep_best:
            return []
        saved = {self.step, *checkpoint.saved_steps(self._directory.checkpoints)}
        rows = [row for row in self._directory.metrics.rows() if row["step"] in saved]
        best = best_steps(rows, config.best_by)
        if not best and best_steps(rows, "eval_accuracy"):
            logger.warning("evaluations have no %s (checkpoint.best_by): no checkpoint is the best", config.best_by)
        return best[: config.keep_best]

    def _latest_checkpoint(self) -> int | None:
        """The newest saved step, as rank 0 sees it. Other nodes may see it only later, because network file systems cache
        directory contents."""
        return on_rank0(lambda: checkpoint.latest_step(self._directory.checkpoints))

    @path_errors()
    def _resume(self) -> None:
        """Load the newest checkpoint, if there is one, and drop outputs that were written after it.

        A rollout-only run keeps the rollouts that were already drawn from the checkpoint's weights.
        """
        step = self._latest_checkpoint() if self.config.checkpoint.resume else None
        if step is not None:
            self.sampler.load_state_dict(checkpoint.load(self._directory.checkpoints, step, self.policy))
            self.step = self.trained = self._version = step
        if self.config.rollout.only and self.config.checkpoint.resume:
            reached = on_rank0(lambda: read_reached(self._directory.reached_file))
            if reached is not None and reached.version == self._version:
                self.sampler.load_state_dict(reached.sampler)
                self.step = self.trained = reached.step
        self._phases.barrier("resume")
        self.has_begun = True
        if self._open_recorder is not None:
            self._directory.truncate_after(self.step)
            self._directory.continue_with(self.config, self.step)
            if self.step >= self.config.run.steps:
                print(
                    f"{self._directory.root}: all run.steps={self.config.run.steps} steps are done; raise run.steps to continue"
                )
            elif self.step:
                print(f"{self._directory.root}: continues after step {self.step}")
            self._directory.write_status("running", self.step, self.config.run.steps)
            self._recorder = self._open_recorder(self.step)
