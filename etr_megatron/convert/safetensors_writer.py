"""Writes safetensors files part by part, in any order, given the names, types and shapes of all tensors beforehand.

The format's own library needs all tensors of a file at once. Here the headers come first, and values are written to their
places in any order and from any process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from etr_megatron.convert.copying import copy_bytes, write_bytes
from etr_megatron.platform.files import write_atomically
from etr_megatron.weights.boxes import StoredBox
from etr_megatron.weights.file_tensor import FileTensor, Index, byte_view, runs
from etr_megatron.weights.safetensors_dir import DTYPES, INDEX

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorToWrite:
    """Name, type and full shape of a tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: Index

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """The files of a checkpoint in `folder`. Each has, in order, tensors of at most `max_bytes` together (or a single larger
    tensor); with None there is one file. stem: prefix of the file names.

    The plan is the same in every process that is given the same tensors. One calls `create` before any calls `write`.
    """

    def __init__(self, folder: Path, tensors: Sequence[TensorToWrite], max_bytes: int | None, stem: str = "model") -> None:
        self._folder = folder
        groups = _grouped(tensors, max_bytes) if max_bytes is not None else [list(tensors)]
        self._headers: dict[Path, bytes] = {}
        self._sizes: dict[Path, int] = {}
        self._places: dict[str, FileTensor] = {}
        for number, group in enumerate(groups, 1):
            one = len(groups) == 1
            file = folder / f"{stem}{'' if one else f'-{number:05d}-of-{len(groups):05d}'}.safetensors"
            # Widest types first, as the format's library does: then every tensor is aligned to its type.
            group = sorted(group, key=lambda tensor: -tensor.dtype.itemsize)
            self._headers[file], begin = _header(group)
            for tensor in group:
                self._places[tensor.name] = FileTensor(file, begin, tensor.dtype, tensor.shape)
                begin += tensor.nbytes
            self._sizes[file] = begin

    def create(self) -> None:
        """Make the files, with their headers and at full length, and the index if there are several."""
        for file, header in self._headers.items():
            with open(file, "wb") as stream:
                stream.write(header)
                stream.truncate(self._sizes[file])
        if len(self._headers) > 1:
            index = {
                "metadata": {"total_size": sum(place.nbytes for place in self._places.values())},
                "weight_map": {name: self._places[name].file.name for name in sorted(self._places)},
            }
            write_atomically(self._folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    @torch.no_grad()
    def write(self, name: str, begin: Index, values: Tensor) -> int:
        """Write a box of a tensor at its offset in the file, cast to the tensor's dtype; returns the bytes written.

        Raises OSError for a full disk.
        """
        place = self._places[name]
        values = values.to(place.dtype).contiguous()
        with open(place.file, "r+b", buffering=0) as file:
            for offset, part in runs(place.shape, begin, tuple(values.shape)):
                write_bytes(file.fileno(), byte_view(values[part]), place.begin + offset * place.dtype.itemsize)
        return values.nbytes

    def copy(self, stored: StoredBox) -> int:
        """Copy a box from file to file; returns its bytes, 0 if its type differs or it is not contiguous in both files."""
        place = self._places[stored.name]
        source, target = stored.span(), place.span(stored.begin, stored.size)
        if source is None or target is None or stored.values.dtype != place.dtype:
            return 0
        (file, first, count), (_, at, _) = source, target
        copy_bytes(file, first, place.file, at, count)
        return count


def _grouped(tensors: Sequence[TensorToWrite], max_bytes: int) -> list[list[TensorToWrite]]:
    groups: list[list[TensorToWrite]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def _header(tensors: Sequence[TensorToWrite]) -> tuple[bytes, int]:
    """The header of a file with these tensors one after the other, and the offset of the first one."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        content[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)
