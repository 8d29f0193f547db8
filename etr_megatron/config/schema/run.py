"""The run, its evaluations, checkpoints and records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    name: str = "run"
    """Name of the run; its directory is `<dir>/<name>`."""
    dir: str = "runs"
    """Parent of all run directories."""
    seed: int = 1
    """Seeds data order, sampling and initialisation."""
    steps: int = 100
    """Rollout steps. Each has `train.epochs * train.minibatches` optimizer steps."""
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA if there is a device."""
    phase_timeout_s: float = 1800.0
    """Deadline, in seconds, of every collective (for model-parallel groups in whole minutes, at least one) and of every rank's
    arrival at a phase, whose error names missing ranks. While rank 0 waits for SGLang servers, or has answers graded, the other
    ranks wait as long as it gives signs of life."""
    stop_grace_s: float = 25.0
    """Seconds from SIGTERM in which the run must stop, save and end with the state `requeue`; a rank that takes longer ends
    without saving, and the state is still `requeue`. Allow for a training phase and a checkpoint; 0 ends at once. torchrun
    kills its ranks 30 s after SIGTERM unless `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` is set, as the launcher does."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = 10
    """Steps between evaluations. The run also evaluates before the first and after the last step; 0 is never."""
    problems: int = 128
    """Maximum number of problems used from each set of `data.eval`."""
    samples: dict[str, int] | int = 1
    """Responses per problem, of all sets or by set: `{aime24: 32, math500: 4}`, 1 for a set that is not named. `eval_accuracy`
    is the share of correct responses (avg@k), which have the reward `reward.range_max`; with more than one response,
    `eval_pass_at_k` is the share of problems with a correct one (pass@k). More than one needs a temperature above 0."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling."""
    top_k: int = 0
    """Top-k sampling; 0 is off."""
    max_response_tokens: int | None = None
    """Token limit of a response; null is `rollout.max_response_tokens`."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 25
    """Steps between checkpoints. The run also saves after the last step and when it is stopped; 0 saves only when stopped."""
    keep: int = 2
    """Number of latest checkpoints to keep."""
    keep_best: int = 0
    """Number of best checkpoints to keep as well, of steps that were evaluated (`eval.every`)."""
    best_by: str = "eval_accuracy"
    """Metric by which checkpoints are compared: higher is better, and `eval_reward_mean` breaks ties. `eval_accuracy`,
    `eval_reward_mean`, `eval_pass_at_k`, `eval_reward/NAME` for a number that `reward.function` returns, or one of these for a
    single held-out set, such as `eval/aime24/accuracy`."""
    asynchronous: bool = False
    """Write checkpoints in the background, from a copy in host memory: the run stops only for the copy. The copy takes as much
    memory as the node's part of a checkpoint, which `tools/plan.py` shows."""
    resume: bool = True
    """Continue from the newest complete checkpoint in the run directory. false refuses a directory with results."""


@dataclass(frozen=True)
class ObserveConfig:
    """What a run writes besides metrics.jsonl, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project; null is off."""
    progress: bool = True
    """Show a progress bar on the terminal."""
    rollouts_every: int = 1
    """Steps between saved rollouts. 0 saves none, nor responses of evaluations."""
    rollouts_groups: int = 4
    """Groups written per saved step, and per held-out set and evaluation."""
    profile_step: int = 0
    """Step whose first update is profiled: each rank of the first data-parallel replica writes a PyTorch trace, to be viewed in
    Perfetto, to `<run>/profiles/`. 0 is none."""
