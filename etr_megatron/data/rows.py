"""Where rows come from: generated arithmetic, a .jsonl or .parquet file, a dataset of the hub. Nothing is tokenised here.

.parquet and hub datasets are read by `datasets`. The lines of a .jsonl file are parsed here, because that reader names
neither the line nor the file of what it cannot parse, cannot leave a line out, and stops where the type of a column that
nobody asked for differs between lines. `datasets` is imported where it reads: it takes half a second of every rank's start, and
arithmetic and .jsonl have no use for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etr_megatron.config.schema import ArithmeticConfig, DataConfig
from etr_megatron.config.sources import Source
from etr_megatron.data.arithmetic import ArithmeticSplit, exercises
from etr_megatron.data.columns import (
    BrokenRowError,
    Columns,
    Messages,
    NoColumnError,
    extra_of,
    find_columns,
    prompt_of,
    text_of,
)
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
    prompt: text, or the messages of a conversation that ends with the user's.
    answer: text, not empty.
    extra: further columns, for a reward of the user's own.
    """

    id: str
    prompt: str | Messages
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Rows:
    """What was read: the good rows in their order, and how many broken ones were left out (`on_bad_row: skip`)."""

    good: list[Row] = field(default_factory=list)
    broken: int = 0


def arithmetic_rows(config: ArithmeticConfig, split: ArithmeticSplit) -> Rows:
    """Generated exercises as rows."""
    return Rows([Row(f"arithmetic:{e.expression}", e.question, str(e.result)) for e in exercises(config, split)])


def read_rows(source: Source, config: DataConfig, extra: tuple[str, ...] = ()) -> Rows:
    """Rows of a .jsonl file, a .parquet file or a hub dataset (`name`, `name:config`, or a directory that holds one).

    Args:
        source: not the generated one.
        config: column names and what happens to a broken row.
        extra: further columns to keep; a row that lacks one has None.

    Raises:
        UserError: the source is missing, unreadable or empty, lacks a column, or has a broken row with
            `data.on_bad_row: fail`.
    """
    location, key = source.location, source.key
    suffix = Path(location).suffix.lower()
    if suffix in (".jsonl", ".parquet"):
        path = Path(location)
        if not path.is_file():
            raise UserError(f"{key}: there is no file {location!r}; give the path of a .jsonl or .parquet file that exists")
        located = _jsonl(path) if suffix == ".jsonl" else _numbered(_read_parquet(path, key), path.name)
    elif suffix in _NOT_READ or Path(location).is_file():
        raise UserError(f"{key}: {location!r} is neither .jsonl nor .parquet; convert it to one of them")
    else:
        located = _numbered(_open_hub(location, source.hub_split, key), f"{location}:{source.hub_split}")
    return _checked(located, source, config, extra)


def _checked(located: Iterator[tuple[str, Any]], source: Source, config: DataConfig, extra: tuple[str, ...]) -> Rows:
    """Apply the column and row rules to (place, row) pairs; a row that could not be parsed comes as its `BrokenRowError`."""
    where = f"{source.key}: {source.location!r}"
    try:
        pairs = list(located)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}); check its permissions") from error
    if not pairs:
        raise UserError(f"{where} holds no rows; give a dataset with at least one")
    parsed = [row for _, row in pairs if isinstance(row, Mapping)]
    try:
        columns = find_columns(parsed, config, extra) if parsed else None
    except NoColumnError as error:
        raise UserError(f"{where} has {error}") from None
    rows = Rows()
    place_of_id: dict[str, str] = {}
    for place, raw in pairs:
        try:
            if isinstance(raw, BrokenRowError):
                raise raw
            assert columns is not None
            row = _row(raw, place, columns)
            if row.id in place_of_id:
                raise BrokenRowError(f"id {row.id!r} is that of {place_of_id[row.id]} already")
        except BrokenRowError as reason:
            if config.on_bad_row == "fail":
                raise UserError(
                    f"{source.key}: {place} of {source.location!r} cannot be used: {reason}; mend it, or set "
                    "data.on_bad_row=skip"
                ) from None
            rows.broken += 1
            continue
        place_of_id[row.id] = place
        rows.good.append(row)
    if not rows.good:
        raise UserError(
            f"{source.key}: none of the {len(pairs)} rows of {source.location!r} can be used; data.on_bad_row=fail names the "
            "first"
        )
    return rows


def _row(raw: Mapping[str, Any], place: str, columns: Columns) -> Row:
    row_id = place if columns.id is None else text_of(raw, columns.id, numbers=True)
    prompt = prompt_of(raw, columns.prompt)
    return Row(row_id, prompt, text_of(raw, columns.answer, numbers=True), extra_of(raw, columns.extra))


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
                yield place, BrokenRowError(f"not UTF-8 at byte {error.start + 1} of the line")
            except json.JSONDecodeError as error:
                yield place, BrokenRowError(f"not JSON at character {error.colno} ({error.msg})")
            except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
                yield place, BrokenRowError(f"not readable JSON ({error})")
            else:
                yield place, row if isinstance(row, dict) else BrokenRowError(f"a JSON {type(row).__name__}, not an object")


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
