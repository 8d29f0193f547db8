"""Finds columns of a row. A column may have alternative names; `outer.inner` is a value in a nested column."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from etr_megatron.config.schema import DataConfig
from etr_megatron.errors import UserError
from etr_megatron.types import Message, further_keys

_MAX_SHOWN = 24
_ROLES = ("system", "user", "assistant", "tool")

Messages = list[Message]
"""The messages of a conversation, each with `role` and `content`."""


class BrokenRowError(Exception):
    """A row cannot be used; the message says why."""


class NoColumnError(Exception):
    """No row has the required columns; the message is part of a sentence."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns to read from a source. id: None if rows are named by their position."""

    prompt: str
    answer: str
    id: str | None
    extra: tuple[str, ...]


def find_columns(
    rows: Iterable[Mapping[str, Any]], config: DataConfig, extra: tuple[str, ...], *, may_lack_extra: bool = False
) -> Columns:
    """For each setting, the first of its names that any row has. extra: `reward.columns`, all required unless `may_lack_extra`.

    Raises NoColumnError, because a column that no row has means a wrong config, not many broken rows.
    """
    available = {name: None for row in rows for name in _names(row)}
    found: dict[str, str | None] = {}
    missing = []
    for setting in ("prompt_column", "answer_column", "id_column"):
        wanted = getattr(config, setting)
        names = (wanted,) if isinstance(wanted, str) else (wanted or ())
        found[setting] = next((name for name in names if name in available), None)
        if names and found[setting] is None:
            missing.append(f"column {' or '.join(map(repr, names))} (data.{setting})")
    if not may_lack_extra:
        missing += [f"column {name!r} (reward.columns)" for name in extra if name not in available]
    if missing:
        shown = [repr(name) for name in available]
        rest = [f"and {len(shown) - _MAX_SHOWN} more"] if len(shown) > _MAX_SHOWN else []
        column_list = f"its columns are {', '.join([*shown[:_MAX_SHOWN], *rest])}" if shown else "it has none at all"
        raise NoColumnError(f"no {' and no '.join(missing)}; {column_list}")
    prompt, answer = found["prompt_column"], found["answer_column"]
    assert prompt is not None and answer is not None  # the config refuses empty names
    return Columns(prompt, answer, found["id_column"], extra)


def _names(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; its name may contain dots. Raises BrokenRowError if the value is missing or null."""
    for value in _values(row, column):
        if value is None:
            raise BrokenRowError(f"column {column!r} is null")
        return value
    raise BrokenRowError(f"column {column!r} is missing")


def _values(row: Mapping[str, Any], column: str) -> Iterator[Any]:
    """Every value that the name may refer to: the column of exactly that name first, then nested columns, split at each dot."""
    if column in row:
        yield row[column]
    for end, letter in enumerate(column):
        if letter == "." and isinstance(row.get(column[:end]), Mapping):
            yield from _values(row[column[:end]], column[end + 1 :])


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text or finite number in a column, as text. Raises BrokenRowError for anything else or blank."""
    value = value_of(row, column)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not isinstance(value, int) and not math.isfinite(value):  # an integer may be too large for a float
            raise BrokenRowError(f"column {column!r} is {value}, not a finite number")
        return str(value)
    if not isinstance(value, str):
        raise BrokenRowError(f"column {column!r} is {type(value).__name__}, not text or a number")
    return _checked_text(value, f"column {column!r}")


def prompt_of(row: Mapping[str, Any], column: str) -> str | Messages:
    """The text of a problem, or the messages of a conversation that ends with a user message. Raises BrokenRowError."""
    value = value_of(row, column)
    if isinstance(value, str):
        return _checked_text(value, f"column {column!r}")
    if not isinstance(value, list):
        raise BrokenRowError(f"column {column!r} is {type(value).__name__}, not text or chat messages")
    if not value:
        raise BrokenRowError(f"column {column!r} is an empty list, not text or chat messages")
    messages = [_message(one, f"message {number} of column {column!r}") for number, one in enumerate(value, start=1)]
    if messages[-1]["role"] != "user":
        raise BrokenRowError(f"the last message of column {column!r} has the role {messages[-1]['role']}, not user")
    return messages


def _message(one: Any, what: str) -> Message:
    if not isinstance(one, Mapping) or not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
        raise BrokenRowError(f"{what} is not an object with `role` and `content`, both text")
    if more := sorted(further_keys(one)):
        raise BrokenRowError(f"{what} has `{more[0]}`, but only `role` and `content` are supported")
    if one["role"] not in _ROLES:
        raise BrokenRowError(f"{what} has the role {one['role']!r}, which is not one of {', '.join(_ROLES)}")
    return {"role": one["role"], "content": _checked_text(one["content"], what)}


def extra_of(row: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """The values of further columns, None for one that the row lacks. Raises BrokenRowError for values that JSON cannot
    hold."""
    found: dict[str, Any] = {}
    for column in columns:
        value = next(_values(row, column), None)
        try:
            # Copy through JSON, as the grader process gets it: tuples become lists and numeric keys become text. Records are
            # UTF-8, which cannot hold half a surrogate pair.
            found[column] = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise BrokenRowError(f"column {column!r} cannot be given to a reward function as JSON ({error})") from None
    return found


def columns_without_values(extras: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> list[str]:
    """The names in `columns` whose value is None in all of `extras` (results of `extra_of`)."""
    missing = dict.fromkeys(columns)
    for extra in extras:
        if not missing:
            break
        missing = {column: None for column in missing if extra[column] is None}
    return list(missing)


def refuse_columns_of_no_set(without: Mapping[str, Iterable[str]], columns: Iterable[str]) -> None:
    """Raise UserError if all of several training sets lack one of `reward.columns`.

    without: the `columns_without_values` of all training sets by their names; empty if there is a single unnamed one, which
    `find_columns` has checked.
    """
    for column in columns:
        if without and all(column in missing for missing in without.values()):
            raise UserError(
                f"reward.columns: no training set has values in a column {column!r}; give the name of a column that at least "
                f"one of {', '.join(without)} has"
            )


def _checked_text(text: str, what: str) -> str:
    if not text.strip():
        raise BrokenRowError(f"{what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can encode half a surrogate pair, which no tokenizer accepts
        raise BrokenRowError(f"{what} has half a surrogate pair at character {error.start + 1}") from None
    return text
