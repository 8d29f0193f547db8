"""Finds a tensor's values in a file of `torch.save`, which is an uncompressed zip archive with a pickle of the layout."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from etr_megatron.weights.file_tensor import FileTensor, Index

_LOCAL_HEADER = 30
"""Bytes before a record's name; the lengths of name and extra field are its last four."""


class Slice(io.RawIOBase):
    """A file object for `length` bytes from `begin` of another file."""

    def __init__(self, file: io.BufferedReader, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, into: Any) -> int:  # noqa: D102
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(memoryview(into)[: max(0, self._length - self._at)])
        self._at += count
        return count


def find_values(path: Path, begin: int, length: int, dtype: torch.dtype, shape: Index) -> FileTensor | None:
    """The values of a tensor that was saved into these bytes of a file; None if they are not dense in C order.

    Raises ValueError, KeyError, zipfile.BadZipFile or pickle.UnpicklingError if no tensor of that type and shape is there.
    """
    with open(path, "rb") as file:
        with zipfile.ZipFile(Slice(file, begin, length)) as archive:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        # Not read through zipfile, which checks CRC sums: torch may have been told to leave them out.
        file.seek(begin + _start(file, begin, records["data.pkl"]))
        pickled = io.BytesIO(file.read(records["data.pkl"].file_size))
        (kind, _, key, _, count), offset, size, stride = _Layout(pickled).load()
        record = records[f"data/{key}"]
        values = FileTensor(path, begin + _start(file, begin, record), dtype, shape)
    if tuple(size) != shape:
        raise ValueError(f"it has shape {list(size)}, not {list(shape)}")
    if record.file_size != count * dtype.itemsize:
        raise ValueError(f"it has {record.file_size} bytes, which do not match {count} values of {dtype}")
    dense = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    plain = (kind, offset, count, record.compress_type) == ("storage", 0, math.prod(shape), zipfile.ZIP_STORED)
    return values if plain and tuple(stride) == dense else None


def _start(file: io.BufferedReader, begin: int, record: zipfile.ZipInfo) -> int:
    """Where a record's content starts in an archive that starts at `begin`."""
    file.seek(begin + record.header_offset)
    header = file.read(_LOCAL_HEADER)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return record.header_offset + _LOCAL_HEADER + name + extra


class _Layout(pickle.Unpickler):
    """Reads the pickle of a tensor as (storage id, offset in the storage, shape, stride); refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch":
            return name  # the storage's type
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid
