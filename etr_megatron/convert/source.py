"""Finds the torch_dist checkpoint of a directory: the checkpoint itself, a checkpoint of a training run, or the run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from etr_megatron.errors import UserError
from etr_megatron.weights import (
    AdapterDir,
    Architecture,
    BoxSource,
    HfBoxes,
    Merged,
    TorchDistDir,
    check_safetensors,
    check_torch_dist,
    holds_adapters,
    is_torch_dist,
    open_checkpoint,
    refuse_adapters,
)
from etr_megatron.weights.hf_config import read_config
from etr_megatron.weights.run_checkpoint import BASE_DTYPE, TRAINER_FILE

_STEP = re.compile(r"step_(\d{6,})$")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """The base model of adapters: a HuggingFace or torch_dist directory, given by the option or file `named`.

    dtype: the dtype in which the run held it; None if neither the checkpoint nor a config.yaml names it.
    """

    path: Path
    named: str
    dtype: torch.dtype | None

    def open(self, arch: Architecture) -> BoxSource:
        """The base's tensors. Raises UserError if they do not match this architecture."""
        if is_torch_dist(self.path):
            return _open_torch_dist(self.path, arch)
        checkpoint = open_checkpoint(self.path)
        check_safetensors(checkpoint, arch)
        return HfBoxes(checkpoint)


@dataclass(frozen=True)
class MegatronSource:
    """weights: the torch_dist directory. config: where config.json and the tokenizer are, given by the option `named`.

    base: the base of a checkpoint of adapters; None for a checkpoint of all weights.
    """

    weights: Path
    config: Path
    named: str
    base: Base | None = None

    def open(self, arch: Architecture) -> BoxSource:
        """The model's tensors. Raises UserError if they do not match this architecture."""
        if self.base is None:
            return _open_torch_dist(self.weights, arch)
        named, adapters = f"{self.base.named} {self.base.path}", AdapterDir(self.weights, arch)
        source = Merged(self.base.open(arch), adapters, self.base.dtype, named)
        for weight, some in adapters.low_rank.adapted(arch):
            for name in (weight.hf[adapter.hf] for adapter in some):
                if (dtype := source.type_of(name, weight)) not in _DTYPES.values():
                    raise UserError(
                        f"{named}: {name} is {dtype}, which no run holds its base in; put the checkpoint below its run's "
                        "config.yaml, which says in what it does"
                    )
        return source


def _open_torch_dist(path: Path, arch: Architecture) -> TorchDistDir:
    source = TorchDistDir(path)
    check_torch_dist(source, arch)
    return source


def find_megatron(path: Path, config_from: Path | None, base: Path | None = None) -> MegatronSource:
    """Find the torch_dist checkpoint at `path`, and its config and base.

    path: a converted directory, a run's `checkpoints/step_000025`, its `checkpoints`, or the run directory (the newest step).

    config_from: where config.json and the tokenizer are; None means the checkpoint itself, or else the run's `model.path`.
    base: of a checkpoint of adapters, the model that they were trained on; None means the run's `model.path`.
    Raises UserError if there is no such checkpoint or no config.json.
    """
    refuse_no_directory(path)
    weights = path if is_torch_dist(path) else _newest_step(path)
    if holds_adapters(weights):
        found = _base(weights, base)
        config = config_from or found.path
        _refuse_no_config(config, config_from)
        return MegatronSource(weights, config, "--config-from" if config_from else found.named, found)
    if base is not None:
        raise UserError(f"--base is for checkpoints of adapters (LoRA), and {weights} holds a whole model; leave it out")
    config = config_from or (weights if (weights / "config.json").is_file() else _model_of_run(weights, "--config-from"))
    _refuse_no_config(config, config_from)
    return MegatronSource(weights, config, "--config-from" if config_from else "--megatron")


def _refuse_no_config(config: Path, config_from: Path | None) -> None:
    if not (config / "config.json").is_file():
        said = f"--config-from {config}" if config_from else str(config)
        raise UserError(f"{said} has no config.json; give the model's HuggingFace directory with --config-from")


def _base(weights: Path, given: Path | None) -> Base:
    """The base of a checkpoint of adapters: `given` by --base, or else the run's `model.path`."""
    file = _run_config(weights)
    if given is not None and not given.is_dir():
        raise UserError(f"--base {given} is not a directory")
    path, named = (given, "--base") if given else (_model_of_run(weights, "--base"), f"{file}: model.path")
    refuse_adapters(path, named)
    return Base(path, named, _dtype_of_run(weights))


def _dtype_of_run(weights: Path) -> torch.dtype | None:
    """The dtype of the run's model, from the checkpoint's `TRAINER_FILE` or, if there is none, from the run's config.yaml."""
    state = weights / TRAINER_FILE
    if state.is_file() and (named := read_config(state).get(BASE_DTYPE)):
        return _DTYPES.get(str(named))
    if not _run_config(weights).is_file():
        return None
    from etr_megatron.config import load_config

    return _DTYPES.get(load_config(_run_config(weights), []).model.dtype)  # a run never writes `auto`


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


def _run_config(weights: Path) -> Path:
    """The config.yaml of the run that a checkpoint belongs to."""
    return weights.parent.parent / "config.yaml"


def _model_of_run(weights: Path, option: str) -> Path:
    """The `model.path` in the run's config.yaml. option: the command-line option that replaces it, for messages."""
    file = _run_config(weights)
    way_out = f"give the model's HuggingFace directory with {option}"
    if not file.is_file():
        missing = f"{file}, which names the model of these adapters, does not exist"
        raise UserError(f"{missing if holds_adapters(weights) else f'{weights} has no config.json'}; {way_out}")
    from etr_megatron.config import load_config, path_of_run

    config = load_config(file, [])
    if config.model.path == "tiny":
        from etr_megatron.data import build_tiny_policy, tiny_policy_path  # imports transformers, not needed otherwise

        made = path_of_run(tiny_policy_path(config.tiny, config.arithmetic), file.parent, config)
        if made.is_dir():
            return made
        if holds_adapters(weights):  # another CPU would train other weights
            raise UserError(f"{made}, the tiny policy that the run of {file} started from, does not exist; {way_out}")
        return build_tiny_policy(config.tiny, config.arithmetic, progress=True)
    model = path_of_run(config.model.path, file.parent, config)
    if not model.is_dir():
        raise UserError(f"{file} says that the run started from {config.model.path}, which does not exist; {way_out}")
    return model
