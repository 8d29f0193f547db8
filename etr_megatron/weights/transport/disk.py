"""Weights through a directory: what `/update_weights_from_disk` of a server takes, and a reader of our own.

DIR/version_000007 holds safetensors files with their index, and version.json. It appears under that name atomically, complete
and on disk; while it is being written it is DIR/.version_000007.unfinished. When a version is written again, the old one is
renamed to DIR/.version_000007.replaced while the new one takes its name: after a crash in between, the next sync restores it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.platform.files import sync_to_disk
from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.checksum import checksum
from etr_megatron.weights.layout import Placement, ServerLayout, WholeLayout, shards_of
from etr_megatron.weights.listing import listed
from etr_megatron.weights.map import Weight, weights_of
from etr_megatron.weights.plan import make_plan
from etr_megatron.weights.quantize import FP8, SCALE_SUFFIX, scale_shape
from etr_megatron.weights.safetensors_dir import INDEX, SafetensorsDir
from etr_megatron.weights.shards import Piece, box
from etr_megatron.weights.transport.board import SyncError
from etr_megatron.weights.transport.buckets import Shards
from etr_megatron.weights.transport.collective import CollectiveTransport, check_shards, shards_wanted
from etr_megatron.weights.transport.interface import Versions
from etr_megatron.weights.transport.verify import compare
from etr_megatron.weights.transport.whole import Gather, groups_of
from etr_megatron.weights.transport.wire import Wire

VERSION_FILE = "version.json"
"""{"version": number, "run": text, "checksums": {tensor: `checksum`}}; checksums is empty unless the writer computes them."""

_REPLACED = ".replaced"

_POLL_S = 0.1


def version_directory(directory: str | Path, version: int) -> Path:
    """Directory of a version once it is complete."""
    return Path(directory) / f"version_{version:06d}"


def owners_of(source: Placement, arch: Architecture) -> dict[str, int]:
    """Weight (`Weight.megatron`) -> the rank that writes it: the least loaded of those that hold a part of it."""
    loads = [0] * source.world
    owners = {}
    for weight in weights_of(arch):
        ranks = {rank for holding in source.holdings(weight, arch) for rank in holding.ranks}
        owner = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[owner] += sum(torch.Size(shape).numel() for shape in weight.shapes)
        owners[weight.megatron] = owner
    return owners


class DiskWriter(CollectiveTransport):
    """See `Transport`; all ranks of the source write, each its share of the full tensors. The wire has exactly those ranks.

    directory: on a file system that all of them and the readers share. run: distinguishes the versions of this run from those
    that an earlier one left in the directory, which are removed; readers get the same value. file_bytes: bound of a file (or
    the largest weight), two of which a rank has in memory. keep: number of complete versions to keep, the last ones published.
    The other arguments are those of `ShardedTransport` and `make_plan`. Raises ValueError for a `keep` below 1.

    Rank 0 decides: a sync that fails before all have written leaves no version behind. One that fails while the others wait for
    rank 0's answer raises, although the complete version may exist.
    """

    def __init__(
        self,
        directory: str | Path,
        source: Placement,
        arch: Architecture,
        wire: Wire,
        *,
        run: str = "",
        dtype: torch.dtype = torch.bfloat16,
        fp8_block: int | None = None,
        file_bytes: int = 1 << 30,
        keep: int = 2,
        checksums: bool = False,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, but must be at least 1")
        nothing = WholeLayout(0, lambda weight: 0)
        super().__init__(wire, arch, source, nothing, 0, fp8_block)
        self.directory, self._run, self._keep, self._checksums = Path(directory), run, keep, checksums
        owners = owners_of(source, arch)
        mine: dict[int, list[Weight]] = {rank: [] for rank in range(source.world)}
        for weight in weights_of(arch):
            mine[owners[weight.megatron]].append(weight)
        files = {rank: list(groups_of(some, dtype, fp8_block, file_bytes)) for rank, some in mine.items()}
        self._own = files[wire.rank]
        rounds = max(len(groups) for groups in files.values())
        together = [[groups[number] for groups in files.values() if number < len(groups)] for number in range(rounds)]
        self._gather = Gather(
            source, arch, lambda w: owners[w.megatron], together, wire, dtype=dtype, bucket_bytes=file_bytes // 8
        )

    def _transfer(self, sources: Shards, destinations: Shards) -> None:
        assert self.versions.begun is not None  # by `sync`
        final = version_directory(self.directory, self.versions.begun)
        unfinished = self.directory / f".{final.name}.unfinished"
        try:
            if self.wire.rank == 0:
                self._bring_back()
                _remove(self.directory.glob(".version_*"))  # left by a killed job
                unfinished.mkdir(parents=True)
            self.wire.board.meet("directory")
            written, sums = self._write_files(unfinished, sources)
            self._publish({"files": written, "checksums": sums}, unfinished, final)
        except BaseException as error:
            self._give_up(error, unfinished)
            raise

    def _give_up(self, error: BaseException, unfinished: Path) -> None:
        """Rank 0 removes what was written; the others do not know whether it was published."""
        board = self.wire.board
        if self.wire.rank == 0:
            if not isinstance(error, SyncError):  # or the others would take their missing directory for the cause
                board.report(f"{type(error).__name__}: {error}")
            # Renamed first: the others may be about to write one more file into it.
            abandoned = unfinished.with_suffix(".abandoned")
            with suppress(FileNotFoundError):
                os.rename(unfinished, abandoned)
            self._bring_back()
            _remove([abandoned])
        elif not unfinished.exists():
            board.refuse_failed()

    def _write_files(self, folder: Path, sources: Shards) -> tuple[dict[str, str], dict[str, int]]:
        """Returns (tensor -> file, tensor -> checksum) of this rank; a file is gathered while the previous one is written."""
        written, sums = {}, {}
        with ThreadPoolExecutor(1) as disk:
            writing = disk.submit(lambda: None)
            for number in range(len(self._gather.exchanges)):
                tensors = self._gather_file(number, sources)
                if tensors is None:
                    continue
                name = f"model-rank{self.wire.rank:05d}-{number:05d}.safetensors"
                writing.result()
                writing = disk.submit(_write_file, folder / name, tensors)
                written.update(dict.fromkeys(tensors, name))
                if self._checksums:
                    sums.update({key: checksum(tensor) for key, tensor in tensors.items()})
            writing.result()
        return written, sums

    def _gather_file(self, number: int, sources: Shards) -> dict[str, Tensor] | None:
        """HF name -> CPU tensor of this rank's file of that number; None if it only helps to gather the others' files."""
        own = None
        if number < len(self._own):
            group = self._own[number]
            own = group, torch.empty(group.nbytes, dtype=torch.uint8, device=self.wire.device)
        full = self._gather.group(number, sources, own)
        if self._checksums:
            compare(self._gather.exchanges[number], sources, full)
        return {field.name: field.view(own[1]).cpu() for field in own[0].tensors} if own is not None else None

    def _publish(self, own: Mapping[str, Mapping[str, str | int]], unfinished: Path, final: Path) -> None:
        """Rank 0 merges the lists of what all have written and gives the directory its name."""
        part = unfinished / f".rank{self.wire.rank}.json"
        part.write_text(json.dumps(own))
        self.wire.board.meet("written")
        if self.wire.rank:
            return
        files, sums = {}, {}
        for rank in range(self.wire.world):
            part = unfinished / f".rank{rank}.json"
            found = json.loads(part.read_text())
            files.update(found["files"])
            sums.update(found["checksums"])
            part.unlink()
        size = sum(path.stat().st_size for path in unfinished.glob("*.safetensors"))
        (unfinished / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}))
        said = {"version": self.versions.begun, "run": self._run, "checksums": sums}
        (unfinished / VERSION_FILE).write_text(json.dumps(said))
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
        """Restore versions that were set aside for a replacement that has not come."""
        for aside in self.directory.glob(f".version_*{_REPLACED}"):
            with suppress(OSError):  # a newer version has the name
                os.rename(aside, self.directory / aside.name[1:].removesuffix(_REPLACED))

    def _outdated(self, published: Path) -> list[Path]:
        """Versions of other runs, and all but the last `keep` that this run published.

        The last ones need not have the largest numbers: a run that goes back writes smaller ones.
        """
        runs = {folder: _read_version_file(folder).get("run") for folder in self.directory.glob("version_*")}
        own = [folder for folder, run in runs.items() if run == self._run and folder != published]
        own.sort(key=lambda folder: ((folder / VERSION_FILE).stat().st_mtime_ns, folder.name))
        kept = [*own, published][-self._keep :]
        return [folder for folder in runs if folder not in kept]

    def close(self) -> None:
        """See `Transport.close`."""
        super().close()
        self._gather.forget()


class DiskReader:
    """See `Transport`: one rank of a destination, which waits for a version to appear and reads its own ranges.

    timeout_s: of that wait. run: the writer's; versions of other runs are ignored. checksums: read every tensor that it needs
    in full and compare it with the writer's checksum, and the shards with the files. Raises UserError when FP8 blocks would be
    cut.
    """

    def __init__(
        self,
        directory: str | Path,
        destination: ServerLayout,
        arch: Architecture,
        rank: int,
        *,
        run: str = "",
        fp8_block: int | None = None,
        timeout_s: float = 600.0,
        checksums: bool = False,
    ) -> None:
        make_plan(WholeLayout(1, lambda weight: 0), destination, arch, fp8_block=fp8_block)  # raises for blocks that are cut
        self.versions = Versions()
        self.directory, self._run, self._timeout_s = Path(directory), run, timeout_s
        self._rank, self._block, self._checksums = rank, fp8_block, checksums
        self._shards = list(shards_of(destination, arch, rank))
        self._wanted = shards_wanted(destination, arch, rank, fp8_block)

    @torch.no_grad()
    def sync(self, version: int, sources: Shards | None = None, destinations: Shards | None = None) -> None:
        """See `Transport.sync`; `sources` must be None. Raises SyncError when the version does not appear, is damaged or does
        not fit the shards, naming the tensors; a version that does not fit is refused before anything is written."""
        if sources is not None:
            raise ValueError("a reader has no sources")
        folder = version_directory(self.directory, version)
        said = self._wait_for(folder, version)
        try:
            files = SafetensorsDir(folder)
            self._refuse_misfit(files, said, version)
            check_shards("destination", self._rank, self._wanted, destinations)
            self.versions.begin(version)
            self._read(files, said["checksums"], destinations or {})
        except (UserError, OSError, ValueError, KeyError) as error:
            raise SyncError(f"the sync of version {version} from {folder} did not complete: {error}") from error
        self.versions.end(version)

    def _wait_for(self, folder: Path, version: int) -> dict[str, Any]:
        """The content of the version's file, once it is there."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            said = _read_version_file(folder)
            if said.get("run") == self._run:
                return said
            if time.monotonic() > deadline:
                other = f"; the files there belong to run {said['run']!r}, not {self._run!r}" if "run" in said else ""
                raise SyncError(
                    f"version {version} of the weights did not appear in {self.directory} in {self._timeout_s:g} s{other}"
                )
            time.sleep(_POLL_S)

    def _refuse_misfit(self, files: SafetensorsDir, said: dict[str, Any], version: int) -> None:
        """Raises ValueError for files of another version, or naming tensors that are missing or of another shape or type."""
        if said.get("version") != version:
            raise ValueError(f"{VERSION_FILE} is for version {said.get('version')}")
        shapes, problems = files.shapes(), []
        for weight, _ in self._shards:
            block = self._block if weight.fp8 else None
            for name, shape in zip(weight.hf, weight.shapes, strict=True):
                wanted = [(name, shape, block is not None)]
                if block is not None:
                    wanted.append((name + SCALE_SUFFIX, scale_shape(shape, block), False))
                for tensor, form, is_fp8 in wanted:
                    if tensor not in shapes:
                        problems.append(f"{tensor} is missing")
                    elif shapes[tensor] != form:
                        problems.append(f"{tensor} has shape {list(shapes[tensor])}, not {list(form)}")
                    elif (files.dtype(tensor) == FP8) != is_fp8:
                        problems.append(f"{tensor} is {files.dtype(tensor)}, which is {'not ' * is_fp8}quantised")
        if problems:
            raise ValueError(f"the files do not fit this reader: {listed(problems, '; ')}")

    def _read(self, files: SafetensorsDir, said: dict[str, int], destinations: Shards) -> None:
        for weight, shard in self._shards:
            target = destinations[weight.megatron]
            if sum(torch.Size(piece.size).numel() for piece in shard.pieces) < target.numel():
                target.zero_()
            for piece in shard.pieces:
                self._read_piece(files, said, weight.hf[piece.hf], piece, target)
                if self._block is not None and weight.fp8:
                    scales = destinations[weight.megatron + SCALE_SUFFIX]
                    self._read_piece(files, said, weight.hf[piece.hf] + SCALE_SUFFIX, _of_scales(piece, self._block), scales)

    def _read_piece(self, files: SafetensorsDir, said: dict[str, int], name: str, piece: Piece, target: torch.Tensor) -> None:
        values = files.read(name, piece.begin, piece.size)
        box(target, piece.at, piece.size).copy_(values)
        if not self._checksums:
            return
        shape = files.shapes()[name]
        whole = files.read(name, (0,) * len(shape), shape)
        if name not in said or checksum(whole) != said[name]:
            raise ValueError(f"{name} differs from what was written")
        if checksum(box(target, piece.at, piece.size).to(values.dtype)) != checksum(box(whole, piece.begin, piece.size)):
            raise ValueError(f"{name} differs in the shard from the file")

    def close(self) -> None:
        """Nothing to release."""


def _of_scales(piece: Piece, block: int) -> Piece:
    """The piece of the scales for a piece of whole blocks."""
    begin, at = (tuple(i // block for i in corner) for corner in (piece.begin, piece.at))
    return Piece(piece.hf, begin, at, scale_shape(piece.size, block))


def _read_version_file(folder: Path) -> dict[str, Any]:
    """The version file's content; empty if there is none, or if it disappears meanwhile, as old versions do."""
    try:
        return json.loads((folder / VERSION_FILE).read_text())
    except (OSError, ValueError):
        return {}


def _write_file(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # also for a full disk, and does not name the file
        raise OSError(f"{file} cannot be written: {error}") from error
    sync_to_disk(file)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
