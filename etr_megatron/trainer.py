"""The story of a run: prompts become rollouts, rollouts become rewarded groups, groups become a packed batch, the batch becomes
Megatron steps under an elastic trust region, and the new weights go back to the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etr_megatron import checkpoint
from etr_megatron.batching import build_batch, minibatches, sequences_of
from etr_megatron.config import Config
from etr_megatron.data import PromptCursor
from etr_megatron.errors import RequeueError
from etr_megatron.metrics import check_logprob_gap, step_metrics
from etr_megatron.observe import Recorder, RunDirectory, Stopwatch
from etr_megatron.platform.phases import Phases
from etr_megatron.policy import Policy, PolicyBatch, Update
from etr_megatron.rollout import EngineGoneError, RolloutEngine, Sampling, generate_groups, grade_groups
from etr_megatron.rollout.collect import Decode, Grader
from etr_megatron.types import Group, Problem


class Trainer:
    """One run on one rank; every rank calls the same methods. `grader` and `recorder` exist on rank 0 alone."""

    def __init__(
        self,
        config: Config,
        *,
        policy: Policy,
        engine: RolloutEngine,
        cursor: PromptCursor,
        held_out: list[Problem],
        decode: Decode,
        directory: RunDirectory,
        grader: Grader | None,
        recorder: Callable[[int], Recorder] | None,
    ) -> None:
        self.config, self.policy, self.engine, self.cursor = config, policy, engine, cursor
        self._held_out, self._decode, self._directory, self._grader = held_out, decode, directory, grader
        self._open_recorder, self._recorder = recorder, None
        self._phases = Phases(config.run.phase_timeout_s)
        self._watch = Stopwatch()
        self.step = 0
        self._trained: tuple[int, dict[str, Any]] = (0, {})  # the step that the policy is after, and the cursor then
        self._unrecorded: tuple[dict[str, Any], list[Group]] | None = None

    def run(self) -> None:
        """From the newest checkpoint, or from the start, to `run.steps`.

        Raises RequeueError, with a checkpoint of all that was trained, when the engine is gone.
        """
        self._resume()
        self._trained = self.step, self.cursor.state_dict()
        try:
            self._run_steps()
        except EngineGoneError as error:
            self.step, cursor = self._trained
            self.cursor.load_state_dict(cursor)
            if self._unrecorded is not None:
                self._record(*self._unrecorded)
            if checkpoint.latest_step(self._directory.checkpoints) != self.step:
                self._save()
            raise RequeueError(f"{error}; step {self.step} is saved: start again with the same command to go on") from error

    def _run_steps(self) -> None:
        config = self.config
        self.engine.update_weights(self.policy.export(), version=self.step)
        first, start = self.step, self._evaluate() if self.step == 0 else {}
        self._watch.lap()
        while self.step < config.run.steps:
            self.step += 1
            groups = self._roll_out()
            batch, updates = self._train(groups, gate=self.step == first + 1)
            row = step_metrics(self.step, groups, batch, updates, config)
            self._trained, self._unrecorded = (self.step, self.cursor.state_dict()), (row, groups)
            self._sync()
            if config.eval.every and (self.step % config.eval.every == 0 or self.step == config.run.steps):
                row |= self._evaluate()
            if start:
                row["eval_accuracy_start"] = start.pop("eval_accuracy")
            self._record(row, groups)
            if config.checkpoint.every and (self.step % config.checkpoint.every == 0 or self.step == config.run.steps):
                self._save()

    def _roll_out(self) -> list[Group]:
        rollout = self.config.rollout
        sampling = Sampling(
            samples=rollout.samples_per_prompt,
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=self.config.run.seed,
            step=self.step,
        )
        problems = self.cursor.next(rollout.prompts_per_step)
        with self._watch.phase("rollout"):
            self._phases.meet(f"rollout of step {self.step}")
            groups = generate_groups(self.engine, problems, sampling, self._decode)
        with self._watch.phase("reward"):
            self._phases.meet(f"rewards of step {self.step}")
            grade_groups(groups, self._grader)
        return groups

    def _train(self, groups: list[Group], *, gate: bool) -> tuple[PolicyBatch, list[Update]]:
        """Old log-probs (and the reference's) under the weights that the updates start from, then the updates."""
        with self._watch.phase("train"):
            self._phases.meet(f"training of step {self.step}")
            sequences, has_reference = sequences_of(groups), self.policy.reference is not None
            old = self.policy.logprobs(sequences)
            reference = self.policy.logprobs(sequences, reference=True) if has_reference else None
            batch = build_batch(groups, self.config, self.step, old=old, reference=reference)
            if gate:
                check_logprob_gap(batch, self.config)
            parts = minibatches(batch, groups, self.config)
            return batch, [self.policy.update(part) for _ in range(self.config.train.epochs) for part in parts]

    def _sync(self) -> None:
        with self._watch.phase("sync"):
            self._phases.meet(f"weight sync of step {self.step}")
            self.engine.update_weights(self.policy.export(), version=self.step)

    def _evaluate(self) -> dict[str, Any]:
        """Accuracy on held-out problems under the engine's current weights; empty when there are none."""
        if not self._held_out or not self.config.eval.every:
            return {}
        sampling = Sampling(
            samples=1,
            max_tokens=self.config.rollout.max_response_tokens,
            temperature=self.config.eval.temperature,
            seed=self.config.run.seed,
            step=-1,  # the same draws at every evaluation, none of them a training step's
        )
        self._phases.meet(f"evaluation after step {self.step}")
        groups = generate_groups(self.engine, self._held_out, sampling, self._decode)
        grade_groups(groups, self._grader)
        right = sum(sample.reward == self.config.reward.range_max for group in groups for sample in group.samples)
        return {"eval_accuracy": right / len(groups)}

    def _record(self, row: dict[str, Any], groups: list[Group]) -> None:
        self._unrecorded = None
        times = self._watch.lap()
        if self._recorder is None:
            return
        tokens = sum(len(sample.response_ids) for group in groups for sample in group.samples)
        self._recorder.record({**row, **times, "tokens_per_s": tokens / times["time_step"]})
        self._directory.write_status("running", self.step, self.config.run.steps)
        observe = self.config.observe
        if observe.rollouts_every and self.step % observe.rollouts_every == 0:
            self._directory.save_rollouts(self.step, groups[: observe.rollouts_groups])

    def _save(self) -> None:
        self._phases.meet(f"checkpoint of step {self.step}")
        state = {"cursor": self.cursor.state_dict()}
        checkpoint.save(self._directory.checkpoints, self.step, self.policy, state, keep=self.config.checkpoint.keep)

    def _resume(self) -> None:
        """Take up the newest checkpoint, if there is one, and forget what was written after it."""
        step = checkpoint.latest_step(self._directory.checkpoints) if self.config.checkpoint.resume else None
        if step is not None:
            state = checkpoint.load(self._directory.checkpoints, step, self.policy)
            self.cursor.load_state_dict(state["cursor"])
            self.step = step
        self._phases.meet("resume")
        if self._open_recorder is not None:
            self._directory.cut_back(self.step)
            self._directory.write_status("running", self.step, self.config.run.steps)
            self._recorder = self._open_recorder(self.step)
