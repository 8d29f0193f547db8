"""Writes a `torch_dist` checkpoint one chunk at a time, with torch's distributed checkpointing.

The layout is planned from names and shapes. A chunk's values are read while the previous chunk is written, and freed once they
are written. megatron-core's own writers first hold all tensors of a rank in memory, and torch's writer keeps the last tensor of
every name.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from etr_megatron.convert.chunk import ChunkToWrite
from etr_megatron.convert.copying import WRITE_BYTES, copy_bytes, start_writeback
from etr_megatron.convert.prefetch import prefetch
from etr_megatron.convert.ranks import Ranks
from etr_megatron.platform.files import disk_full_behind
from etr_megatron.weights.file_tensor import Index, Span

_SMALL = 2**16
"""Minimum bytes of a tensor for `_fill`; smaller tensors are read and written with `_write_values`."""


class _Hole(NamedTuple):
    """Stands for values that files contain exactly as they will be stored. spans: their byte ranges, in order."""

    nbytes: int
    size: Index
    dtype: torch.dtype
    spans: list[Span]


def _item(chunk: ChunkToWrite) -> WriteItem:
    """The chunk as a write item of torch's planner."""
    place = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size))
    data = TensorWriteData(place, TensorProperties(chunk.dtype), torch.Size(chunk.shape))
    return WriteItem(MetadataIndex(chunk.name, chunk.offset), WriteItemType.SHARD, tensor_data=data)


class _Planner(SavePlanner):
    """Plans chunks whose values are not in memory yet, and objects by name. Each object is None."""

    def __init__(self, chunks: Sequence[ChunkToWrite], objects: Sequence[str]) -> None:
        self._chunks, self._objects = chunks, objects

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """There is no state to plan from."""

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan(items + [_item(chunk) for chunk in self._chunks])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self._at = {MetadataIndex(chunk.name, chunk.offset): chunk for chunk in self._chunks}
        return new_plan

    # Only `_Writer` calls this, and it handles `_Hole`.
    def resolve_data(self, write_item: WriteItem) -> io.BytesIO | Tensor | _Hole:  # type: ignore[override]
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([None], data)  # Megatron's form: the objects of one key
            return data
        chunk = self._at[write_item.index]
        spans = chunk.spans() if chunk.nbytes >= _SMALL else None
        return chunk.read() if spans is None else _Hole(chunk.nbytes, chunk.size, chunk.dtype, spans)


class _Writer(dcp.FileSystemWriter):
    """One file per rank; a chunk is written while the next one is resolved, and then freed."""

    def __init__(self, path: Path, written: Callable[[int], Any]) -> None:
        super().__init__(path, overwrite=False)
        self._written = written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        name = f"{plan.storage_data.prefix}0.distcp"
        try:
            with open(Path(self.path) / name, "wb") as file:
                data = prefetch(map(planner.resolve_data, plan.items))
                written = [self._write(file, name, *one) for one in zip(plan.items, data, strict=True)]
                future.set_result(written)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            # torch.save raises another error for a failed write, with the OSError as its context, which torch loses when it
            # gathers the failures of all ranks.
            full = disk_full_behind(error)
            raise OSError(full.errno, full.strerror) if full is not None else error from error
        return future

    def _write(self, file: io.BufferedWriter, name: str, item: WriteItem, data: io.BytesIO | Tensor | _Hole) -> WriteResult:
        if isinstance(data, io.BytesIO):
            begin = file.tell()
            file.write(data.getbuffer())
        else:
            begin = _fill(file, data) if isinstance(data, _Hole) else _write_values(file, data)
            self._written(data.nbytes)
        length = file.tell() - begin
        return WriteResult(item.index, length, _StorageInfo(name, begin, length))


def _write_values(file: io.BufferedWriter, values: Tensor) -> int:
    """Write a tensor with `torch.save`; returns the offset at which it begins."""
    begin = file.tell()
    torch.save(values, _Stream(file))  # type: ignore[arg-type]  # torch itself asks for `write` and `flush` alone
    start_writeback(file.fileno(), begin, file.tell() - begin)
    return begin


def _fill(file: io.BufferedWriter, hole: _Hole) -> int:
    """As `_write_values`, but copy the values from other files into a hole between the bytes that `torch.save` writes.

    A few bytes are skipped first, so that values have the same offset within a page in both files: the kernel copies a whole
    page faster than parts of two pages.
    """
    around = _Around(hole.nbytes)
    nothing = torch.empty(hole.size, dtype=hole.dtype)  # untouched memory takes no room
    torch.save(nothing, around)  # type: ignore[arg-type]  # as above
    if around.after is None:
        raise RuntimeError("torch.save did not write a tensor's values at once")
    (_, first, _), *_ = hole.spans
    begin = file.seek((first - len(around.before) - file.tell()) % mmap.PAGESIZE, io.SEEK_CUR)
    file.write(around.before)
    at = file.tell()
    file.seek(hole.nbytes, io.SEEK_CUR)
    file.write(around.after)
    for source, first, count in hole.spans:
        copy_bytes(source, first, Path(file.name), at, count)
        at += count
    return begin


class _Around:
    """A file for torch.save; keeps the bytes before and after a write of `hole` bytes. `after` is None until that write."""

    def __init__(self, hole: int) -> None:
        self._hole = hole
        self.before = bytearray()
        self.after: bytearray | None = None

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        if self.after is not None:
            self.after += whole
        elif len(whole) == self._hole:
            self.after = bytearray()
        else:
            self.before += whole
        return len(whole)

    def flush(self) -> None:
        """There is nothing to flush."""


class _Stream:
    """The file that torch.save writes to; splits large writes into small ones."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for begin in range(0, len(whole), WRITE_BYTES):
            self._file.write(whole[begin : begin + WRITE_BYTES])
        return len(whole)

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _torch_options() -> Iterator[None]:
    """Turn off CRC32 sums: torch.load never checks them, and computing them takes longer than writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # expected with one process
            yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_torch_dist(
    path: Path, chunks: Sequence[ChunkToWrite], objects: Sequence[str], ranks: Ranks, written: Callable[[int], Any]
) -> None:
    """Write this rank's chunks, and rank 0's objects (names; each is None), as a checkpoint that Megatron loads. A collective.

    written: called with the bytes of each chunk once it is in the file. Raises, on every rank, the error of the first rank that
    failed: OSError for a full disk, or whatever reading a chunk raises.
    """
    try:
        with _torch_options():
            dcp.save(
                {},
                storage_writer=_Writer(path, written),
                planner=_Planner(chunks, objects if ranks.rank == 0 else ()),
                process_group=ranks.group,
                no_dist=ranks.world == 1,
            )
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None
    ranks.on_rank0(lambda: _write_common(path))


def _write_common(path: Path) -> None:
    """The files that Megatron keeps beside the tensors: an empty common state, and the formats."""
    torch.save({}, path / "common.pt")
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    (path / "metadata.json").write_text(json.dumps(backends | versions))
