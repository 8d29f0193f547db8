"""Finds the torch_dist checkpoint of a directory: the checkpoint itself, a checkpoint of a training run, or the run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from etr_megatron.errors import UserError
from etr_megatron.weights import is_torch_dist

_STEP = re.compile(r"step_(\d{6,})$")


@dataclass(frozen=True)
class MegatronSource:
    """weights: the torch_dist directory. config: where config.json and the tokenizer are, given by the option `named`."""

    weights: Path
    config: Path
    named: str


def find_megatron(path: Path, config_from: Path | None) -> MegatronSource:
    """path: a converted directory, a run's `checkpoints/step_000025` or `checkpoints`, or the run's own (its newest step).

    config_from: where config.json and the tokenizer are; None means the checkpoint itself, or else the run's `model.path`.
    Raises UserError if there is no such checkpoint or no config.json.
    """
    refuse_no_directory(path)
    weights = path if is_torch_dist(path) else _newest_step(path)
    config = config_from or (weights if (weights / "config.json").is_file() else _model_of_run(weights))
    if not (config / "config.json").is_file():
        said = f"--config-from {config}" if config_from else str(config)
        raise UserError(f"{said} has no config.json; give the model's HuggingFace directory with --config-from")
    return MegatronSource(weights, config, "--config-from" if config_from else "--megatron")


def refuse_no_directory(path: Path) -> None:
    """Raise UserError if `path` is not a directory."""
    if not path.is_dir():
        raise UserError(f"--megatron {path} is not a directory")


def _newest_step(path: Path) -> Path:
    """The newest complete checkpoint of a run; incomplete ones have other names."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    names = ((_STEP.match(entry.name), entry) for entry in folder.iterdir())
    steps = {int(name[1]): entry for name, entry in names if name and is_torch_dist(entry)}
    if not steps:
        raise UserError(f"--megatron {path} is neither a torch_dist checkpoint (no .metadata) nor a run with checkpoints")
    return steps[max(steps)]


def _model_of_run(weights: Path) -> Path:
    """The `model.path` in the run's config.yaml."""
    file = weights.parent.parent / "config.yaml"
    if not file.is_file():
        raise UserError(f"{weights} has no config.json; give the model's HuggingFace directory with --config-from")
    from etr_megatron.config import load_config, path_of_run

    config = load_config(file, [])
    if config.model.path == "tiny":
        from etr_megatron.data import build_tiny_policy, tiny_policy_path  # imports transformers, not needed otherwise

        made = path_of_run(tiny_policy_path(config.tiny, config.arithmetic), file.parent, config)
        return made if made.is_dir() else build_tiny_policy(config.tiny, config.arithmetic, progress=True)
    model = path_of_run(config.model.path, file.parent, config)
    if not model.is_dir():
        raise UserError(
            f"{file} says that the run started from {config.model.path}, which does not exist; give the model's HuggingFace "
            "directory with --config-from"
        )
    return model
