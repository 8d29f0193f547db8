"""`recorded/step_000012.jsonl`: everything that a step trained on, for inspection or replay.

The first line holds the sampler's metrics; every other line is one group with tokens, log-probs, weight versions and rewards.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save

from etr_megatron.errors import UserError
from etr_megatron.platform.files import entries, write_atomically
from etr_megatron.rollout.record_checks import check_group, check_head
from etr_megatron.types import Group, Problem, Sample

RECORDED = "recorded"
"""Name of the folder in a run directory."""
_ONLY_WITH_AN_ENVIRONMENT = ("messages", "loss_mask", "environment_status")
"""Sample and problem fields that are written only if they are not empty."""
_MAX_HEAD_BYTES = 2**16
_LINE_END = len("}\n")


@dataclass(frozen=True)
class RolloutProgress:
    """Progress of a run that only records: it has finished `step` with weight version `version`. sampler: the sampler's state
    at that point."""

    version: int
    step: int
    sampler: dict[str, Any]


def record_path(folder: Path, step: int) -> Path:
    """The file of a step; names sort like steps."""
    return folder / f"step_{step:06d}.jsonl"


def recorded_steps(folder: Path) -> list[int]:
    """The steps recorded in `folder`, in order. Files not named as by `record_path`, such as copies, are ignored."""
    found = ((path, path.stem.removeprefix("step_")) for path in entries(folder, "step_*.jsonl"))
    return sorted(int(step) for path, step in found if step.isdecimal() and path == record_path(folder, int(step)))


def write_record(
    folder: Path, step: int, groups: Sequence[Group], counts: dict[str, float], old_logprobs: Iterable[Sequence[float]] | None
) -> None:
    """Write a step's file atomically; raises UserError on a full disk.

    counts: the sampler's metrics. old_logprobs: the trainer's own log-probs, for each sample in the order of the groups, of the
    response tokens that the model generated; None if the trainer has not computed them. In the file, tokens of replies have
    null.
    """
    folder.mkdir(exist_ok=True)
    lines = itertools.chain([{"step": step, "counts": counts}], _lines(groups, old_logprobs))
    # One line after the other, as a step may have gigabytes.
    write_atomically(record_path(folder, step), ((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines))


def _lines(groups: Sequence[Group], old_logprobs: Iterable[Sequence[float]] | None) -> Iterator[dict[str, Any]]:
    old = iter(old_logprobs or ())
    for group in groups:
        line = group_to_json(group)
        for sample, written in zip(group.samples, line["samples"], strict=True) if old_logprobs is not None else ():
            written["old_logprobs"] = _of_all_tokens(next(old), sample)
        yield line


def read_record(folder: Path, step: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The groups of a step in the format of `group_to_json`, and the sampler's metrics.

    Raises UserError when the step is missing or its file is damaged, so callers can rely on that format.
    """
    path = record_path(folder, step)
    if not path.is_file():
        raise UserError(what_there_is(folder, step))
    try:
        head, groups = _parsed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a recorded step ({error})") from error
    return groups, head["counts"]


def glance_at_record(folder: Path, step: int) -> None:
    """Check only the beginning and the end of an existing file. Raises UserError when it is truncated or not a record."""
    path = record_path(folder, step)
    with path.open("rb") as file:
        head = file.readline(_MAX_HEAD_BYTES)
        groups = file.read(1)
        file.seek(-min(_LINE_END, file.seek(0, os.SEEK_END)), os.SEEK_END)
        end = file.read()
    try:
        _parsed_line(1, head.decode("utf-8"))
        if not groups:
            raise ValueError("it has no groups")
        if not end.removesuffix(b"\n").endswith(b"}"):
            raise ValueError("its last line is cut off")
    except ValueError as error:
        raise UserError(f"{path} is not a recorded step ({error})") from error


def _parsed(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line and the groups; raises ValueError saying what is wrong with them."""
    # Not splitlines(): it also splits at U+2028, U+0085 and the like, which JSON strings may contain unescaped.
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise ValueError("it is empty")
    head, *groups = (_parsed_line(number, line) for number, line in enumerate(lines, start=1))
    if not groups:
        raise ValueError("it has no groups")
    return head, groups


def _parsed_line(number: int, line: str) -> dict[str, Any]:
    """The head (line 1) or a group."""
    try:
        found = json.loads(line)
        (check_group if number > 1 else check_head)(found)
    except json.JSONDecodeError as error:  # its own message says line 1
        raise ValueError(f"line {number}: not JSON at character {error.colno}, {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error
    return found


def what_there_is(folder: Path, missing: int) -> str:
    """Error message for a record without step `missing`: which steps `folder` has."""
    steps = recorded_steps(folder)
    if not folder.is_dir():
        return f"there is no directory {folder}; give the directory of a run that was made with rollout.record=true"
    if not steps:
        return f"{folder} has no recorded steps; give the directory of a run that was made with rollout.record=true"
    return f"{folder} has recorded steps {steps[0]} to {steps[-1]}, but not step {missing}"


def write_reached(file: Path, reached: RolloutProgress) -> None:
    """Write the progress, replacing the progress written before. Raises UserError on a full disk."""
    state = dict(reached.sampler)
    tensors = state.pop("tensors", {})
    said = json.dumps({"version": reached.version, "step": reached.step, "sampler": state})
    write_atomically(file, save(tensors, metadata={"reached": said}))


def read_reached(file: Path) -> RolloutProgress | None:
    """The progress that `write_reached` wrote last; None if there is no file."""
    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        found = json.loads(opened.metadata()["reached"])
        found["sampler"]["tensors"] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return RolloutProgress(**found)


def group_to_json(group: Group, without: Collection[str] = ()) -> dict[str, Any]:
    """The group as JSON values, lossless. without: sample fields to leave out, because they are stored elsewhere."""
    samples = [_plain(sample, without) for sample in group.samples]
    return {"id": group.id, "problem": _plain(group.problem), "samples": samples}


def group_from_json(found: dict[str, Any]) -> Group:
    """The group that `group_to_json` wrote; keys added to its samples are ignored."""
    known = {field.name for field in fields(Sample)}
    samples = []
    for one in found["samples"]:
        values = {key: value for key, value in one.items() if key in known}
        if isinstance(values.get("routing"), str):
            values["routing"] = array("B", base64.b64decode(values["routing"]))
        samples.append(Sample(**values))
    return Group(found["id"], Problem(**found["problem"]), samples)


def _plain(one: Problem | Sample, without: Collection[str] = ()) -> dict[str, Any]:
    values = {field.name: getattr(one, field.name) for field in fields(one) if field.name not in without}
    values = {name: value for name, value in values.items() if value or name not in _ONLY_WITH_AN_ENVIRONMENT}
    if "routing" in values:  # base64, as there are a hundred numbers per token
        values["routing"] = base64.b64encode(values["routing"]).decode()
    # Lists are copied too, because messages may grow while a checkpoint or a record is being written.
    return {name: list(value) if isinstance(value, array | list) else value for name, value in values.items()}


def _of_all_tokens(generated: Sequence[float], sample: Sample) -> list[float | None]:
    """The inverse of `Sample.select_generated`, with None for tokens of replies."""
    if not sample.loss_mask:
        return list(generated)
    rest = iter(generated)
    return [next(rest) if is_drawn else None for is_drawn in sample.loss_mask]
