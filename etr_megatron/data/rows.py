"""Sources of rows: generated arithmetic, a .jsonl or .parquet file, or a hub dataset. Nothing is tokenized here.

`datasets` reads .parquet and hub datasets. The lines of a .jsonl file are parsed here, because that reader does not name the
line or file of a parse error, cannot skip a line, and stops if the type of an unused column differs between lines. `datasets`
is imported only where it reads: it adds half a second to every rank's startup, and arithmetic and .jsonl do not need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etr_megatron.config.schema import ArithmeticConfig, DataConfig
from etr_megatron.config.sources import ARITHMETIC, Source
from etr_megatron.data.arithmetic import ArithmeticSplit, exercises
from etr_megatron.data.columns import (
    BrokenRowError,
    Columns,
    Messages,
    NoColumnError,
    columns_without_values,
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
    """A prompt and its answer as in the source.

    id: value of the id column, else `<file>:<line or row>` or `<dataset>:<split>:<row>` (counted from 1).
    prompt: text, or the messages of a conversation that ends with a user message.
    answer: text, not empty.
    extra: further columns, for a custom reward function.
    """

    id: str
    prompt: str | Messages
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Rows:
    """The good rows in order, and the number of broken ones left out (`on_bad_row: skip`)."""

    good: list[Row] = field(default_factory=list)
    broken: int = 0


def arithmetic_rows(config: ArithmeticConfig, split: ArithmeticSplit, extra: tuple[str, ...] = ()) -> Rows:
    """Generated exercises as rows; the columns `extra` have no values."""
    none = dict.fromkeys(extra)
    return Rows([Row(f"arithmetic:{e.expression}", e.question, str(e.result), none) for e in exercises(config, split)])


def read_rows(source: Source, config: DataConfig, extra: tuple[str, ...] = ()) -> Rows:
    """Rows of a .jsonl file, a .parquet file or a hub dataset (`name`, `name:config`, or a directory with one).

    Args:
        source: any but generated arithmetic.
        config: column names and the handling of broken rows.
        extra: further columns to keep; None in a row that lacks one. A held-out set, and one of several training sets, may lack
            one in all rows.

    Raises:
        UserError: the source is missing, unreadable or empty, lacks a column, or has a broken row with
            `data.on_bad_row: fail`.
    """
    location, key = source.location, source.key
    suffix = Path(location).suffix.lower()
    if source.is_file:
        path = Path(location)
        if not path.is_file():
            raise UserError(f"{key}: there is no file {location!r}; give the path of an existing .jsonl or .parquet file")
        located = _jsonl(path) if suffix == ".jsonl" else _numbered(_read_parquet(path, key), path.name)
    elif suffix in _NOT_READ or Path(location).is_file():
        raise UserError(f"{key}: {location!r} is neither .jsonl nor .parquet; convert it to one of them")
    else:
        located = _numbered(_open_hub(location, source.hub_split, key), f"{location}:{source.hub_split}")
    return _checked(located, source, config, extra)


def usable_rows(
    source: Source, config: DataConfig, arithmetic: ArithmeticConfig, extra: tuple[str, ...]
) -> tuple[int, list[str]]:
    """(number of usable rows, columns of `extra` without a value in all of them); a prompt may still be too long.

    Raises UserError as `read_rows` does.
    """
    if source.location == ARITHMETIC:
        return arithmetic.train_problems if source.split == "train" else arithmetic.eval_problems, list(extra)
    rows = read_rows(source, config, extra).good
    return len(rows), columns_without_values((row.extra for row in rows), extra)


def _checked(located: Iterator[tuple[str, Any]], source: Source, config: DataConfig, extra: tuple[str, ...]) -> Rows:
    """Apply the column and row rules to (place, row) pairs; an unparsable row is given as its `BrokenRowError`."""
    where = f"{source.key}: {source.location!r}"
    try:
        pairs = list(located)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or error}); check its permissions") from error
    if not pairs:
        raise UserError(f"{where} has no rows; give a dataset with at least one")
    parsed = [row for _, row in pairs if isinstance(row, Mapping)]
    try:
        may_lack_extra = source.split == "eval" or bool(source.name)
        columns = find_columns(parsed, config, extra, may_lack_extra=may_lack_extra) if parsed else None
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
                raise BrokenRowError(f"id {row.id!r} is already that of {place_of_id[row.id]}")
        except BrokenRowError as reason:
            if config.on_bad_row == "fail":
                raise UserError(
                    f"{source.key}: {place} of {source.location!r} cannot be used: {reason}; fix it, or set "
                    "data.on_bad_row=skip"
                ) from None
            rows.broken += 1
            continue
        place_of_id[row.id] = place
        rows.good.append(row)
    if not rows.good:
        raise UserError(
            f"{source.key}: none of the {len(pairs)} rows of {source.location!r} can be used; set data.on_bad_row=fail to see "
            "what is wrong with the first"
        )
    return rows


def _row(raw: Mapping[str, Any], place: str, columns: Columns) -> Row:
    row_id = place if columns.id is None else text_of(raw, columns.id)
    prompt = prompt_of(raw, columns.prompt)
    return Row(row_id, prompt, text_of(raw, columns.answer), extra_of(raw, columns.extra))


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(`<file>:<line>`, object or the `BrokenRowError`) for every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))  # else an error at its end is on line 2
            except UnicodeDecodeError as error:
                yield place, BrokenRowError(f"not UTF-8 at byte {error.start + 1} of the line")
            except json.JSONDecodeError as error:
                yield place, BrokenRowError(f"not JSON at character {error.colno} ({error.msg})")
            except (RecursionError, ValueError) as error:  # too deeply nested, or an integer of thousands of digits
                yield place, BrokenRowError(f"not readable JSON ({error})")
            else:
                yield place, row if isinstance(row, dict) else BrokenRowError(f"a JSON {type(row).__name__}, not an object")


def _numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    """(`<name>:<row>`, row), counted from 1."""
    return ((f"{name}:{number}", row) for number, row in enumerate(rows, start=1))


def _read_parquet(path: Path, key: str) -> list[dict[str, Any]]:
    """The rows of a parquet file, streamed without a copy in the cache of `datasets`."""
    import datasets

    try:
        # Set a batch size, because the reader's default (the first row group's size) fails on an empty file.
        return list(
            datasets.load_dataset(
                "parquet", data_files={"rows": str(path)}, split="rows", streaming=True, batch_size=_PARQUET_BATCH
            )
        )
    except Exception as error:  # pyarrow and datasets raise types without a common base
        raise UserError(f"{key}: {str(path)!r} cannot be read as parquet ({_first_line(error)}); write it again") from error


def _open_hub(source: str, split: str, key: str) -> datasets.Dataset:
    """A split of a hub dataset, from the local cache of `datasets` in offline mode or without a network."""
    import datasets

    name, _, subset = source.partition(":")
    with hub_or_cache(name) as unreachable:
        try:
            return datasets.load_dataset(name, subset or None, split=split)
        except Exception as error:  # hub clients (httpx, huggingface_hub) raise types without a common base
            is_absent = unreachable is not None and isinstance(error, ConnectionError)
            reason = f"it is not in the cache, and {unreachable}" if is_absent else _first_line(error)
            raise UserError(
                f"{key}: dataset {source!r} (split {split!r}) could not be loaded ({reason}); check name and split, or "
                "download it on a machine with network access and give a .jsonl or .parquet file"
            ) from error


def _first_line(error: Exception) -> str:
    while "error occurred while generating" in str(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # `datasets` only says that there was an error
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
