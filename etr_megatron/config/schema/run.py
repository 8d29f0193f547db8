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
    """Rollout steps; each holds `train.epochs * train.minibatches` optimizer steps."""
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a device."""
    phase_timeout_s: float = 1800.0
    """Deadline, in seconds, of every collective (of model-parallel groups in whole minutes, one at least) and of every rank's
    arrival at a phase; the latter's error names who is missing. While rank 0 has SGLang servers generate, or answers graded,
    the others wait for as long as it gives signs of life."""
    stop_grace_s: float = 25.0
    """After SIGTERM the run stops at its next phase, or while it waits for servers' responses, saves and ends with the state
    `requeue`; a rank that is not done by so many seconds ends without. To be longer than a training phase and a checkpoint
    take; 0 ends at once. torchrun itself kills after 30 s unless told otherwise (`TORCH_ELASTIC_SHUTDOWN_TIMEOUT`); our
    launcher tells it."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = 10
    """Steps between evaluations (also before the first and after the last); 0 is never."""
    problems: int = 128
    """At most so many problems of each set of `data.eval`."""
    samples: int = 1
    """Responses to each problem; `eval_accuracy` is the share of all that are right (avg@k), and with more than one
    `eval_pass_at_k` the share of problems with a right one (pass@k). More than one needs a temperature."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling."""
    top_k: int = 0
    """0 is off."""
    max_response_tokens: int | None = None
    """Most tokens of a response; null is `rollout.max_response_tokens`."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 25
    """Steps between checkpoints (also after the last step, and when a run is stopped); 0 is none but when it is stopped."""
    keep: int = 2
    """Last checkpoints kept."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run directory; false refuses to start in a used one."""


@dataclass(frozen=True)
class ObserveConfig:
    """What is written while it runs; metrics.jsonl always is."""

    tensorboard: bool = True
    """Event files beside the metrics."""
    wandb_project: str | None = None
    """Weights & Biases project; null is off."""
    progress: bool = True
    """A bar on the terminal."""
    rollouts_every: int = 1
    """Steps between saved rollouts; 0 is never, and no evaluation's responses either."""
    rollouts_groups: int = 4
    """Groups written per saved step, and of each held-out set per evaluation."""
