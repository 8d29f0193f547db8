"""The architecture of a config's model, from the model's directory or a shipped config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from etr_megatron.config import Config
from etr_megatron.errors import UserError
from etr_megatron.platform.files import path_errors

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
"""config.json files of published models, so that a run can be planned before anything is downloaded."""


def architecture_of(config: Config) -> Architecture:
    """The architecture of `model.path`, whose directory need not exist if a config.json of its name is shipped.

    Raises UserError if there is neither.
    """
    from etr_megatron.weights import read_architecture, tiny_architecture

    path = Path(config.model.path)
    if config.model.path == "tiny":
        return tiny_architecture(config.tiny)
    with path_errors():
        if path.is_dir():
            return read_architecture(path)
        if (MODELS / path.name / "config.json").is_file():
            return read_architecture(MODELS / path.name)
    known = ", ".join(sorted(folder.name for folder in MODELS.iterdir())) if MODELS.is_dir() else "none"
    raise UserError(
        f"model.path: {path} is not a directory, and no config.json of a model {path.name} is shipped (shipped: {known}); give "
        "a directory with the model's config.json"
    )
