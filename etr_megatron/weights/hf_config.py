"""A HuggingFace config.json, and its fields one by one: what is missing or of another kind is one sentence that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etr_megatron.errors import UserError


def read_config(source: Path) -> dict[str, Any]:
    """The file's object. Raises FileNotFoundError, and UserError for what cannot be read or is no JSON object."""
    try:
        config = json.loads(source.read_text())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8, or nested without an end
        raise UserError(f"{source} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{source} holds {spelled(config)}; an object with the model's fields is wanted")
    return config


def is_positive_int(value: Any) -> bool:
    """JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def positive_int(config: dict[str, Any], name: str, source: Path, default: int | None = None) -> int:
    """The field `name`, or `default`, where there is one, for a field that is absent or null.

    source: the file, for messages. Raises UserError naming file and field, as the others here.
    """
    return _field(config, name, source, default, is_positive_int, "a positive integer")


def positive_number(config: dict[str, Any], name: str, source: Path, default: float | None = None) -> float:
    """See `positive_int`; finite, of any fraction."""

    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)

    return _field(config, name, source, default, fits, "a positive number")


def optional_bool(config: dict[str, Any], name: str, source: Path) -> bool:
    """A field that is true or false, false where it is absent or null. Raises UserError."""
    return _field(config, name, source, False, lambda value: isinstance(value, bool), "true or false")


def optional_object(config: dict[str, Any], name: str, source: Path) -> dict[str, Any]:
    """A field that is an object, empty where it is absent or null. Raises UserError."""
    return _field(config, name, source, {}, lambda value: isinstance(value, dict), "an object")


def optional_layers(config: dict[str, Any], name: str, source: Path) -> list[int]:
    """A field that is a list of layers' numbers, empty where it is absent or null. Raises UserError."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and all(layer == 0 or is_positive_int(layer) for layer in value)

    return _field(config, name, source, [], fits, "a list of layers' numbers")


def _field(config: dict[str, Any], name: str, source: Path, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
    if default is not None and config.get(name) is None:
        return default
    if name not in config:
        raise UserError(f"{source}: field {name!r} is missing")
    if not fits(config[name]):
        raise UserError(f"{source}: {name} is {spelled(config[name])}; {wanted} is wanted")
    return config[name]


def spelled(value: Any) -> str:
    """As it stands in the file, its beginning at least."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
