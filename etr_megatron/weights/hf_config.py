"""Reads a HuggingFace config.json and its fields; a missing or malformed field raises one sentence that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etr_megatron.errors import UserError


def read_config(source: Path) -> dict[str, Any]:
    """The file's object. Raises FileNotFoundError, and UserError for a file that cannot be read or is not a JSON object."""
    try:
        config = json.loads(source.read_text())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8, or nested too deeply
        raise UserError(f"{source} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{source} must hold an object with the model's fields, not {spelled(config)}")
    return config


def is_positive_int(value: Any) -> bool:
    """Whether the value is a positive integer; JSON's true is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def positive_int(config: dict[str, Any], name: str, source: Path, default: int | None = None) -> int:
    """The field `name`; `default`, if there is one, when the field is absent or null.

    source: the file, for messages. Raises UserError naming file and field, as the functions below.
    """
    return _field(config, name, source, default, is_positive_int, "a positive integer")


def natural_number(config: dict[str, Any], name: str, source: Path, default: int | None = None) -> int:
    """As `positive_int`, also for 0."""
    return _field(config, name, source, default, lambda value: type(value) is int and value >= 0, "0 or a positive integer")


def positive_number(config: dict[str, Any], name: str, source: Path, default: float | None = None) -> float:
    """As `positive_int`, for any finite number."""

    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)

    return _field(config, name, source, default, fits, "a positive number")


def optional_bool(config: dict[str, Any], name: str, source: Path) -> bool:
    """A boolean field, false if it is absent or null. Raises UserError."""
    return _field(config, name, source, False, lambda value: isinstance(value, bool), "true or false")


def optional_object(config: dict[str, Any], name: str, source: Path) -> dict[str, Any]:
    """An object field, empty if it is absent or null. Raises UserError."""
    return _field(config, name, source, {}, lambda value: isinstance(value, dict), "an object")


def optional_layers(config: dict[str, Any], name: str, source: Path) -> list[int]:
    """A field with a list of layer numbers, empty if it is absent or null. Raises UserError."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and all(layer == 0 or is_positive_int(layer) for layer in value)

    return _field(config, name, source, [], fits, "a list of layer numbers")


def _field(config: dict[str, Any], name: str, source: Path, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
    if default is not None and config.get(name) is None:
        return default
    if name not in config:
        raise UserError(f"{source}: field {name!r} is missing")
    if not fits(config[name]):
        raise UserError(f"{source}: {name} must be {wanted}, not {spelled(config[name])}")
    return config[name]


def spelled(value: Any) -> str:
    """The value as JSON, truncated if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
