"""Where rows come from: generated arithmetic, a .jsonl or .parquet file, a dataset of the hub. Nothing is tokenised here.

.parquet and hub datasets are read by `datasets`. The lines of a .jsonl file are parsed here, because that reader names
neither the line nor the file of what it cannot parse, cannot leave a line out, and stops where the type of a column that
nobody asked for differs between lines. `datasets` is imported where it reads: it takes half a second of every rank's start, and
arithmetic and .jsonl have no use for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etr_megatron.config.schema import ArithmeticConfig, DataConfig
from etr_megatron.data.arithmetic import ArithmeticSplit, exercises
from etr_megatron.data.hub import hub_or_cache
from etr_megatron.errors import UserError

if TYPE_CHECKING:
    import datasets

_NOT_READ = (".csv", ".tsv", ".json", ".txt", ".arrow", ".gz", ".zst", ".zip")
_PARQUET_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and its answer as they stand in the source.

    id: value of the id column, else `<file>:<line or row>` (counted from 1).
    prompt, answer: text, not empty.
    """

    id: str
    prompt: str
    answer: str


@dataclass(slots=True)
class Rows:
    """What was read: the good rows in their order, and how many broken ones were left out (`on_bad_row: skip`)."""

    good: list[Row] = field(default_factory=list)
    broken: int = 0


class _BrokenRow(Exception):
    """Why a row cannot be used."""


def arithmetic_rows(config: ArithmeticConfig, split: ArithmeticSplit) -> Rows:
    """Generated exercises as rows."""
    return Rows([Row(f"arithmetic:{e.expression}", e.question, str(e.result)) for e in exercises(config, split)])


def read_rows(source: str, hub_split: str, config: DataConfig, key: str) -> Rows:
    """Rows of a .jsonl file, a .parquet file or a hub dataset (`name` or `name:config`).

    Args:
        source: value of `data.train` or `data.eval`.
        hub_split: which split of a hub dataset.
        config: column names and what happens to a broken row.
        key: config key of `source`, for messages.

    Raises:
        UserError: the source is missing, unreadable or empty, lacks a column, or has a broken row with
            `data.on_bad_row: fail`.
    """
    suffix = Path(source).suffix.lower()
    if suffix in (".jsonl", ".parquet"):
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{key}: there is no file {source!r}; give the path of a .jsonl or .parquet file that exists")
        located = _jsonl(path) if suffix == ".jsonl" else _numbered(_read_parquet(path, key), path.name)
    elif suffix in _NOT_READ or Path(source).is_file():
        raise UserError(f"{key}: {source!r} is neither .jsonl nor .parquet; convert it to one of them")
    else:
        located = _numbered(_open_hub(source, hub_split, key), f"{source}:{hub_split}")
    return _checked(located, source, config, key)


def _checked(located: Iterator[tuple[str, Any]], source: str, config: DataConfig, key: str) -> Rows:
    """Apply the column and row rules to (place, row) pairs; a row that could not be parsed comes as its `_BrokenRow`."""
    try:
        pairs = list(located)
    except OSError as error:
        raise UserError(f"{key}: {source!r} cannot be read ({error.strerror}); check its permissions") from error
    if not pairs:
        raise UserError(f"{key}: {source!r} holds no rows; give a dataset with at least one")
    _require_columns([row for _, row in pairs if isinstance(row, Mapping)], source, config, key)
    rows, place_of_id = Rows(), {}
    for place, raw in pairs:
        try:
            if isinstance(raw, _BrokenRow):
                raise raw
            row = _row(raw, place, config)
            if row.id in place_of_id:
                raise _BrokenRow(f"id {row.id!r} is that of {place_of_id[row.id]} already")
        except _BrokenRow as reason:
            if config.on_bad_row == "fail":
                raise UserError(
                    f"{key}: {place} of {source!r} cannot be used: {reason}; mend it, or set data.on_bad_row=skip"
                ) from None
            rows.broken += 1
            continue
        place_of_id[row.id] = place
        rows.good.append(row)
    if not rows.good:
        raise UserError(f"{key}: none of the {len(pairs)} rows of {source!r} can be used; data.on_bad_row=fail names the first")
    return rows


def _require_columns(rows: list[Mapping[str, Any]], source: str, config: DataConfig, key: str) -> None:
    """Columns that no row has are a wrong config, not many broken rows."""
    available = {column: None for row in rows for column in row}
    wanted = {setting: getattr(config, setting) for setting in ("prompt_column", "answer_column", "id_column")}
    missing = [
        f"column {column!r} (data.{setting})"
        for setting, column in wanted.items()
        if column is not None and column not in available
    ]
    if rows and missing:
        columns = ", ".join(map(repr, available))
        raise UserError(f"{key}: {source!r} has no {' and no '.join(missing)}; its columns are {columns}")


def _row(raw: Mapping[str, Any], place: str, config: DataConfig) -> Row:
    row_id = place if config.id_column is None else _text(raw, config.id_column, numbers=True)
    prompt = _text(raw, config.prompt_column, numbers=False)
    return Row(row_id, prompt, _text(raw, config.answer_column, numbers=True))


def _text(raw: Mapping[str, Any], column: str, *, numbers: bool) -> str:
    """The text in a column; with `numbers`, a finite number is written out."""
    value = raw.get(column)
    if value is None:
        raise _BrokenRow(f"column {column!r} is {'null' if column in raw else 'missing'}")
    if numbers and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _BrokenRow(f"column {column!r} is {value}, not a finite number")
        return str(value)
    if not isinstance(value, str):
        raise _BrokenRow(f"column {column!r} is {type(value).__name__}, not text{' or a number' if numbers else ''}")
    if not value.strip():
        raise _BrokenRow(f"column {column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise _BrokenRow(f"column {column!r} holds half a surrogate pair at character {error.start + 1}") from None
    return value


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(`<file>:<line>`, object or the reason why it is none) for every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))  # else what is cut off ends on a line 2
            except UnicodeDecodeError as error:
                yield place, _BrokenRow(f"not UTF-8 at byte {error.start + 1} of the line")
            except json.JSONDecodeError as error:
                yield place, _BrokenRow(f"not JSON at character {error.colno} ({error.msg})")
            except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
                yield place, _BrokenRow(f"not readable JSON ({error})")
            else:
                yield place, row if isinstance(row, dict) else _BrokenRow(f"a JSON {type(row).__name__}, not an object")


def _numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    """(`<name>:<row>`, row), counted from 1."""
    return ((f"{name}:{number}", row) for number, row in enumerate(rows, start=1))


def _read_parquet(path: Path, key: str) -> list[dict[str, Any]]:
    """Streamed from where it lies, with no copy in the cache of `datasets`."""
    import datasets

    try:
        # A batch size of our own, because the reader's default (the first row group's size) fails on an empty file.
        return list(
            datasets.load_dataset(
                "parquet", data_files={"rows": str(path)}, split="rows", streaming=True, batch_size=_PARQUET_BATCH
            )
        )
    except Exception as error:  # pyarrow's and datasets' own types, with no common base
        raise UserError(f"{key}: {str(path)!r} cannot be read as parquet ({_first_line(error)}); write it anew") from error


def _open_hub(source: str, split: str, key: str) -> datasets.Dataset:
    """A split of a hub dataset, from the local cache of `datasets` when offline, or where there is no network."""
    import datasets

    name, _, subset = source.partition(":")
    with hub_or_cache(name) as unreachable:
        try:
            return datasets.load_dataset(name, subset or None, split=split)
        except Exception as error:  # hub clients raise types of their own (httpx, huggingface_hub) with no common base
            is_absent = unreachable is not None and isinstance(error, ConnectionError)
            reason = f"it is not in the cache, and {unreachable}" if is_absent else _first_line(error)
            raise UserError(
                f"{key}: dataset {source!r} (split {split!r}) could not be loaded ({reason}); check name and split, or "
                "download it where there is a network and give a .jsonl or .parquet file"
            ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
