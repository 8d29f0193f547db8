"""Sends weights through a directory that a server's `/update_weights_from_disk` reads.

DIR/version_000007 holds safetensors files with their index, and version.json. While it is being written its name is
DIR/.version_000007.unfinished; it is renamed once it is complete and on disk. When a version is written again, the old
directory is first renamed to DIR/.version_000007.replaced. If the job crashes before the new one has the name, the next sync
restores it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from etr_megatron.platform.files import sync_to_disk
from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.layout import WeightLayout
from etr_megatron.weights.map import Weight, weights_of
from etr_megatron.weights.safetensors_dir import INDEX
from etr_megatron.weights.transport.base import Transport
from etr_megatron.weights.transport.board import SyncError
from etr_megatron.weights.transport.buckets import Shards
from etr_megatron.weights.transport.whole import Gather, weight_groups
from etr_megatron.weights.transport.wire import Wire

VERSION_FILE = "version.json"
"""{"version": number, "run": text}"""

KEEP = 2
"""Number of complete versions to keep, the last ones published."""

_REPLACED = ".replaced"


def version_directory(directory: str | Path, version: int) -> Path:
    """Directory of a version once it is complete."""
    return Path(directory) / f"version_{version:06d}"


def owners_of(source: WeightLayout, arch: Architecture) -> dict[str, int]:
    """Weight (`Weight.megatron`) -> the rank that writes it: the least loaded of the ranks that hold a part of it."""
    loads = [0] * source.world
    owners = {}
    for weight in weights_of(arch):
        ranks = {rank for placed in source.placed_shards(weight, arch) for rank in placed.ranks}
        owner = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[owner] += sum(torch.Size(shape).numel() for shape in weight.shapes)
        owners[weight.megatron] = owner
    return owners


class DiskWriter(Transport):
    """See `Transport`; all ranks of the source write, each its share of the full tensors. The wire has exactly those ranks.

    directory: on a file system that these ranks and the readers share. run: identifies this run's versions; versions that
    another run left in the directory are removed. file_bytes: bound of a file (or the largest weight); a rank has two files in
    memory. The other arguments are those of `ShardedTransport` and `make_reshard_plan`.

    Rank 0 publishes a version. A sync that fails before all ranks have written leaves no version behind. A sync that fails
    while the other ranks wait for rank 0's answer raises on them, although the complete version may exist.
    """

    def __init__(
        self,
        directory: str | Path,
        source: WeightLayout,
        arch: Architecture,
        wire: Wire,
        *,
        run: str = "",
        dtype: torch.dtype = torch.bfloat16,
        fp8_block: int | None = None,
        file_bytes: int = 1 << 30,
    ) -> None:
        super().__init__(wire, arch, source)
        self.directory, self._run = Path(directory), run
        owners = owners_of(source, arch)
        mine: dict[int, list[Weight]] = {rank: [] for rank in range(source.world)}
        for weight in weights_of(arch):
            mine[owners[weight.megatron]].append(weight)
        files = {rank: weight_groups(some, dtype, fp8_block, file_bytes) for rank, some in mine.items()}
        self._own = files[wire.rank]
        self._index = {
            "metadata": {"total_size": sum(group.nbytes for groups in files.values() for group in groups)},
            "weight_map": {
                field.name: _file_name(rank, number)
                for rank, groups in files.items()
                for number, group in enumerate(groups)
                for field in group.tensors
            },
        }
        self._rounds = max(len(groups) for groups in files.values())
        together = [[groups[number] for groups in files.values() if number < len(groups)] for number in range(self._rounds)]
        self._gather = Gather(
            source,
            arch,
            lambda weight: owners[weight.megatron],
            together,
            wire,
            self._memory,
            dtype=dtype,
            bucket_bytes=file_bytes // 8,
        )

    def _transfer(self, version: int, sources: Shards, destinations: Shards) -> None:
        final = version_directory(self.directory, version)
        unfinished = self.directory / f".{final.name}.unfinished"
        try:
            if self.wire.rank == 0:
                self._bring_back()
                _remove(self.directory.glob(".version_*"))  # left by a killed job
                unfinished.mkdir(parents=True)
            self.wire.board.barrier("directory")
            self._write_files(unfinished, sources)
            self.wire.board.barrier("written")
            if self.wire.rank == 0:
                self._publish(version, unfinished, final)
        except BaseException as error:
            self._give_up(error, unfinished)
            raise

    def _give_up(self, error: BaseException, unfinished: Path) -> None:
        """Rank 0 removes what was written; the others do not know whether it was published."""
        board = self.wire.board
        if self.wire.rank == 0:
            if not isinstance(error, SyncError):  # else the others would blame their missing directory
                board.report(f"{type(error).__name__}: {error}")
            # Rename before removing: other ranks may be about to write one more file into it.
            abandoned = unfinished.with_suffix(".abandoned")
            with suppress(FileNotFoundError):
                os.rename(unfinished, abandoned)
            self._bring_back()
            _remove([abandoned])
        elif not unfinished.exists():
            board.refuse_failed()

    def _write_files(self, folder: Path, sources: Shards) -> None:
        """Write this rank's files. A file is gathered while the previous one is written."""
        with ThreadPoolExecutor(1) as disk:
            writing = disk.submit(lambda: None)
            for number in range(self._rounds):
                tensors = self._gather_file(number, sources)
                if tensors is None:
                    continue
                writing.result()
                writing = disk.submit(_write_file, folder / _file_name(self.wire.rank, number), tensors)
            writing.result()

    def _gather_file(self, number: int, sources: Shards) -> dict[str, Tensor] | None:
        """HF name -> CPU tensor for this rank's file `number`; None if it only sends shards for others' files."""
        if number >= len(self._own):
            self._gather.run(number, sources, None)
            return None
        group = self._own[number]
        flat = torch.empty(group.nbytes, dtype=torch.uint8, device=self.wire.device)
        self._gather.run(number, sources, (group, flat))
        return {field.name: field.view(flat).cpu() for field in group.tensors}

    def _publish(self, version: int, unfinished: Path, final: Path) -> None:
        """On rank 0, when all files are written: add the index and rename the directory to its final name."""
        (unfinished / INDEX).write_text(json.dumps(self._index))
        (unfinished / VERSION_FILE).write_text(json.dumps({"version": version, "run": self._run}))
        for name in (INDEX, VERSION_FILE):
            sync_to_disk(unfinished / name)
        sync_to_disk(unfinished)
        self.wire.board.refuse_failed()
        if final.exists():
            os.rename(final, self.directory / f".{final.name}{_REPLACED}")
        os.rename(unfinished, final)
        sync_to_disk(self.directory)
        _remove([*self.directory.glob(f".version_*{_REPLACED}"), *self._outdated(final)])

    def _bring_back(self) -> None:
        """Restore versions that were renamed for a replacement that was never published."""
        for aside in self.directory.glob(f".version_*{_REPLACED}"):
            with suppress(OSError):  # the replacement has the name
                os.rename(aside, self.directory / aside.name[1:].removesuffix(_REPLACED))

    def _outdated(self, published: Path) -> list[Path]:
        """Versions of other runs, and all but the last `KEEP` that this run published.

        The last ones need not have the largest numbers: a run that resumes from an older checkpoint writes smaller numbers.
        """
        runs = {folder: _run_of(folder) for folder in self.directory.glob("version_*")}
        own = [folder for folder, run in runs.items() if run == self._run and folder != published]
        own.sort(key=lambda folder: ((folder / VERSION_FILE).stat().st_mtime_ns, folder.name))
        kept = [*own, published][-KEEP:]
        return [folder for folder in runs if folder not in kept]


def _file_name(rank: int, number: int) -> str:
    return f"model-rank{rank:05d}-{number:05d}.safetensors"


def _run_of(version: Path) -> str | None:
    """The run that wrote a version; None if the version's file is missing, as when an old version is removed meanwhile."""
    try:
        return json.loads((version / VERSION_FILE).read_text()).get("run")
    except (OSError, ValueError):
        return None


def _write_file(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # also for a full disk, and does not name the file
        raise OSError(f"{file} cannot be written: {error}") from error
    sync_to_disk(file)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
