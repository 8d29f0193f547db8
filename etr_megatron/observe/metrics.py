"""`metrics.jsonl`: one JSON object per step, the source of truth for every curve."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, TypedDict, cast

from etr_megatron.errors import UserError
from etr_megatron.platform.files import disk_errors, sync_to_disk, write_atomically


class StepMetrics(TypedDict):
    """The keys in every row of a training run. Means over tokens are over the step's response tokens, on all ranks, without
    those of an environment's replies."""

    step: int  # rollout step, counted from 1
    weight_version: int  # newest weight version that generated a token of the step
    reward_mean: float  # verifier's reward, mean over samples
    accuracy: float  # share of samples with the highest reward (`reward.range_max`)
    entropy: float  # entropy of the policy before the updates, nats per token; also see `objective.old_logp: engine`
    loss: float  # mean over the step's updates
    grad_norm: float  # gradient norm before clipping, mean over the step's updates
    lr: float  # learning rate of the step's last update
    ratio_mean: float  # importance ratio of the updated to the old policy, mean over tokens
    effective_sample_size: float  # (sum r)^2 / (n sum r^2) of the importance ratios r of n tokens, at most 1
    clip_frac_upper: float  # share of tokens whose gradient the upper bound stopped; with `cispo`, whose weight it limited
    clip_frac_lower: float  # same for the lower bound
    clip_radius_mean: float  # half the width of the clip range, mean over tokens
    clip_radius_p10: float  # 10th percentile over tokens
    clip_radius_p90: float  # 90th percentile over tokens
    kl: float  # KL to the reference model, nats per token; 0 without one
    logprob_gap_mean: float  # abs(engine - trainer) of log-probs, nats per token; for stale tokens, later updates add to it
    logprob_gap_max: float  # largest gap of a token; null if the trainer computed no old log-probs
    mismatch_kl: float  # KL(engine || trainer), k3 estimator, nats per token
    correction_mean: float  # mean off-policy weight of a token; 1 without a correction
    correction_frac: float  # share of tokens that the correction truncated or masked
    zero_variance_groups: int  # groups whose verifier's rewards that count are all equal; no policy gradient, unless shaped
    truncated: int  # samples cut off at `rollout.max_response_tokens`
    reward_timeouts: int  # answers not graded within `reward.timeout_s`; they get the lowest reward
    reward_errors: int  # answers on which the reward function failed; they get the lowest reward
    response_tokens_mean: float  # response tokens per sample, with those of an environment's replies
    tokens_per_s: float  # response tokens of the step that the model generated / `time_step`
    time_rollout: float  # seconds that the step waited for responses
    time_reward: float  # seconds that the step waited for rewards
    time_train: float  # seconds of training: waiting for other ranks, reloading, log-probs and updates
    time_sync: float  # seconds for the weight sync to the engine
    time_step: float  # seconds since the end of the previous step, including evaluation and checkpoints


class MetricsRow(StepMetrics, total=False):
    """A row; only some steps have the keys below, those of `PASS_RATE_KEYS`, `train/...`, `eval/...` and `loss/...`.

    With several held-out sets, `eval_...` keys are means over sets; `eval/<name>/accuracy` and so on are those of one set.
    `train/<name>/accuracy` and so on are those of the step's groups of one training set.
    """

    eval_accuracy: float  # share of responses to held-out problems with the highest reward, after the step's updates
    eval_accuracy_start: float  # same before any update; all `..._start` keys are in the first row only
    eval_reward_mean: float  # mean reward of the responses to held-out problems
    eval_reward_mean_start: float  # same before any update
    eval_pass_at_k: float  # for sets with `eval.samples` above 1: share of held-out problems with a correct response
    eval_pass_at_k_start: float  # same before any update
    eval_response_tokens_mean: float  # tokens per response to a held-out problem, with those of an environment's replies
    eval_response_tokens_mean_start: float  # same before any update
    eval_truncated_frac: float  # share of responses to held-out problems cut off at the evaluation's token limit
    eval_truncated_frac_start: float  # same before any update
    eval_turns_mean: float  # with an environment: turns of the model per response to a held-out problem
    eval_turns_mean_start: float  # same before any update
    eval_reply_tokens_mean: float  # tokens of the environment's replies per response to a held-out problem
    eval_reply_tokens_mean_start: float  # same before any update
    eval_environment_failed_frac: float  # share of responses to held-out problems that ended as a call failed or timed out
    eval_environment_failed_frac_start: float  # same before any update
    turns_mean: float  # with an environment: turns of the model per sample
    reply_tokens_mean: float  # with an environment: tokens of its replies per sample; the loss does not cover them
    environment_errors: int  # with an environment: samples, left out of the loss, that ended because its function failed
    environment_timeouts: int  # the same, because it did not return within `environment.timeout_s`
    reward_shaped_mean: float  # reward that is trained on, if it is not the verifier's; mean over samples without a failed call
    groups_asked: int  # with dynamic sampling: prompts requested since the last step, including those requested ahead
    groups_dropped: int  # with dynamic sampling: groups left out because their rewards are all equal
    groups_filled: int  # groups that were left out, but trained on because there were too few others
    groups_given_up: int  # groups given up because they crashed servers or got no answer; only if there were any
    servers_serving: int  # SGLang servers that accept requests when a step's rollout is complete; the others have failed
    server_running_mean: float  # requests that an SGLang server generates at a time; mean over servers and their reports
    server_queued_mean: float  # requests that wait in a server's own queue; mean over servers and reports
    server_queued_max: int  # most requests in a server's queue
    server_cache_used_mean: float  # share of a server's KV cache in use, in its fullest attention group; mean as above
    server_cache_used_max: float  # largest share of a server's KV cache
    server_tokens_per_s_mean: float  # tokens that a server decodes per second of decoding; mean over servers
    staleness_mean: float  # with `max_staleness`: age of a token in weight syncs when it is trained on, mean over tokens
    staleness_max: int  # largest age of a token
    groups_redone: int  # groups generated again because they had tokens that were too old
    groups_pending: int  # with `max_staleness`: groups begun or complete, kept for later steps
    tflops_per_gpu: float  # model TFLOP/s per rank: FLOPs of log-probs and updates / `time_train`; recomputation not counted
    mfu: float  # `tflops_per_gpu` / bf16 peak of the device, if that is known
    memory_allocated_gib: float  # peak GPU memory of a rank's tensors since the last step's updates, highest of all ranks
    memory_reserved_gib: float  # same, including memory that torch's allocator caches
    load_balancing_loss: float  # with `moe_aux_loss_coef`: Megatron's loss without the coefficient, mean over tokens; 1 is even
    expert_load_imbalance: float  # with experts: tokens of a layer's busiest expert / mean of its experts, mean over layers
    routing_replayed: float  # with `routing_replay`: share of the model's response tokens predicted with the engine's experts
    time_logprobs: float  # part of `time_train`: seconds for the old log-probs, if the trainer computed them
    time_reference: float  # part of `time_train`: seconds for the reference model's log-probs, if there is one
    time_update: float  # part of `time_train`: seconds for the step's updates
    time_checkpoint: float  # seconds that the run was stopped by checkpoints since the previous row, if it was
    time_checkpoint_write: float  # with `checkpoint.asynchronous`: seconds to write the checkpoint that became complete
    samples_continued: int  # with partial rollouts: samples with tokens of several weight versions


METRIC_KEYS: tuple[str, ...] = tuple(StepMetrics.__annotations__)
"""The keys of every row of a training run, in their order in the file."""
PASS_RATE_KEYS: tuple[str, ...] = tuple(
    f"{key}_pass_{low}_{low + 25}"
    for low in (0, 25, 50, 75)
    for key in ("clip_frac_upper", "clip_frac_lower", "clip_radius_mean", "clip_radius_p10", "clip_radius_p90")
)
"""The same over tokens of groups with a pass rate from low to below high percent (and above 0), on steps that have any."""
ROLLOUT_METRIC_KEYS: tuple[str, ...] = (
    *("step", "weight_version", "reward_mean", "accuracy", "zero_variance_groups", "truncated", "reward_timeouts"),
    *("reward_errors", "response_tokens_mean", "tokens_per_s"),
    *("time_rollout", "time_reward", "time_train", "time_sync", "time_step"),
)
"""The keys of a row of `--rollout-only`, which lacks those that come from training."""
OPTIONAL_METRIC_KEYS: tuple[str, ...] = (
    *(key for key in MetricsRow.__annotations__ if key not in METRIC_KEYS),
    *PASS_RATE_KEYS,
)
"""Keys that only some rows have."""
REWARD_PREFIX = "reward/"
"""Prefix of keys for further numbers that a reward function returns, means over the samples that have them."""
LOSS_PREFIX = "loss/"
"""Prefix of keys for further values that a loss reports, means over tokens."""
SET_PREFIX = "eval/"
"""Prefix of the keys of a named held-out set: `eval/<name>/accuracy`, and so on."""
TRAIN_SET_PREFIX = "train/"
"""Prefix of the keys of a named training set: `train/<name>/` and each of `TRAIN_SET_KEYS`."""
TRAIN_SET_KEYS = ("groups", "reward_mean", "accuracy", "zero_variance_groups", "truncated", "response_tokens_mean")
"""Keys of a named training set, which mean the same as in every row; without groups in a step it has only `groups`."""
_NAMED_ELSEWHERE = (TRAIN_SET_PREFIX, SET_PREFIX, LOSS_PREFIX, REWARD_PREFIX, f"eval_{REWARD_PREFIX}")


def keys_by_set(row: MetricsRow, prefix: str, metric: str) -> dict[str, str]:
    """The keys `<prefix><name>/<metric>` that `row` has, by name. A set's name has no slash, so reward parts do not match."""
    found = re.compile(rf"{re.escape(prefix)}([^/]+)/{re.escape(metric)}")
    return {match[1]: key for key in row if (match := found.fullmatch(key))}


def set_accuracies(row: MetricsRow) -> dict[str, float]:
    """The accuracies of the named held-out sets that `row` has, by name."""
    values: dict[str, Any] = dict(row)
    return {name: values[key] for name, key in keys_by_set(row, SET_PREFIX, "accuracy").items()}


class MetricsLog:
    """The rows of one run.

        log = MetricsLog(run / "metrics.jsonl")
        log.append(row)              # on disk when it returns
        log.truncate_after(step=25)  # on resume: drop what came after the checkpoint

    A NaN or an infinity is written as `null`: strict JSON cannot represent it, and refusing the row would lose the
    very step at which a run went wrong. Readers interpret `null` as "was not finite".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_step: int | None = None  # None: the file has not been read yet

    def append(self, row: MetricsRow) -> None:
        """Add the row of the next step and wait until it is on disk.

        Raises `ValueError` for missing or unknown keys and for a step that is not after the last one, `TypeError` for a
        value that is not a number, `UserError` if the disk is full (the file then ends with the last whole row).
        """
        line = (json.dumps(_checked(row), allow_nan=False) + "\n").encode()
        if self._last_step is None:
            self._last_step = self._drop_torn_line()
        if row["step"] <= self._last_step:
            raise ValueError(f"metrics row of step {row['step']} after that of step {self._last_step}")
        with disk_errors(self.path):
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                _append_whole(descriptor, line)
            finally:
                os.close(descriptor)
            if is_new:
                sync_to_disk(self.path.parent)
        self._last_step = row["step"]

    def rows(self) -> list[MetricsRow]:
        """All whole rows, oldest first; ignores a last line without its newline (killed during a write)."""
        return [row for _, row in self._lines()]

    def last(self) -> MetricsRow | None:
        """The newest whole row, or None."""
        lines = self._lines()
        return lines[-1][1] if lines else None

    def complete(self, step: int, values: dict[str, float]) -> None:
        """Add values to the last row, atomically: after a crash the file has either the old row or the new one.

        Raises `ValueError` if the last row is not of `step` or already has one of the values, and as `append` for bad values.
        """
        *before, (_, row) = self._lines()
        if row["step"] != step or values.keys() & row.keys():
            raise ValueError(f"metrics row of step {row['step']} cannot be given {sorted(values)} of step {step}")
        given = {key: math.nan if value is None else value for key, value in row.items()}
        line = json.dumps(_checked(cast(MetricsRow, given | values)), allow_nan=False) + "\n"
        write_atomically(self.path, b"".join(kept for kept, _ in before) + line.encode())

    def truncate_after(self, step: int) -> int:
        """Keep the rows up to and including `step`, byte for byte, and return how many were dropped."""
        lines = self._lines()
        kept = [line for line, row in lines if row["step"] <= step]
        if self.path.exists():
            write_atomically(self.path, b"".join(kept))
        self._last_step = None
        return len(lines) - len(kept)

    def _lines(self) -> list[tuple[bytes, MetricsRow]]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        return [(line, self._parsed(line, number)) for number, line in enumerate(lines, start=1)]

    def _parsed(self, line: bytes, number: int) -> MetricsRow:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path}, line {number}: not JSON ({error}); fix or remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{self.path}, line {number}: not a metrics row with a whole `step`; fix or remove the line")
        return cast(MetricsRow, row)

    def _drop_torn_line(self) -> int:
        """Truncate the file to whole rows, so that the next is not appended to a partial one; returns the last step or -1."""
        lines = self._lines()
        whole = sum(len(line) for line, _ in lines)
        if self.path.exists() and self.path.stat().st_size != whole:
            os.truncate(self.path, whole)
        return lines[-1][1]["step"] if lines else -1


def _append_whole(descriptor: int, line: bytes) -> None:
    """Write all of `line` and sync it, or leave the file as it was."""
    before = os.fstat(descriptor).st_size
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def _checked(row: MetricsRow) -> dict[str, Any]:
    """The row in the file's key order, numbers only, with non-finite values as None."""
    given: dict[str, Any] = dict(row)
    is_trained = any(key in given for key in METRIC_KEYS if key not in ROLLOUT_METRIC_KEYS)
    missing = [key for key in (METRIC_KEYS if is_trained else ROLLOUT_METRIC_KEYS) if key not in given]
    named_elsewhere = [key for key in given if key.startswith(_NAMED_ELSEWHERE)]
    unknown = [key for key in given if key not in (*METRIC_KEYS, *OPTIONAL_METRIC_KEYS, *named_elsewhere)]
    if missing or unknown:
        raise ValueError(
            f"metrics row of step {given.get('step')}: missing keys {missing}, unknown keys {unknown}; the list of keys "
            "is etr_megatron.observe.metrics.MetricsRow"
        )
    checked: dict[str, Any] = {}
    for key in (*METRIC_KEYS, *OPTIONAL_METRIC_KEYS, *named_elsewhere):
        if key not in given:
            continue
        value = given[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"metrics row: {key} is {value!r} ({type(value).__name__}), not an int or a float")
        checked[key] = value if math.isfinite(value) else None
    if not isinstance(given["step"], int):
        raise TypeError(f"metrics row: step is {given['step']!r}, not an int")
    return checked
