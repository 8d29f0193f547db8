"""The base of all transports: roles, the begin and end of a sync, and errors that reach every rank."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import NamedTuple

import torch

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.layout import WeightLayout, shards_of
from etr_megatron.weights.listing import listed
from etr_megatron.weights.quantize import FP8, SCALE_SUFFIX, scale_shape
from etr_megatron.weights.transport.board import SyncError
from etr_megatron.weights.transport.buckets import Shards
from etr_megatron.weights.transport.exchange import Memory
from etr_megatron.weights.transport.wire import Wire


class ExpectedShard(NamedTuple):
    """Requirements for a shard. filled: leading rows that are not padding. dtype: None allows any dtype except FP8."""

    shape: tuple[int, ...]
    filled: int
    dtype: torch.dtype | None = None


def expected_shards(layout: WeightLayout, arch: Architecture, rank: int, fp8_block: int | None) -> dict[str, ExpectedShard]:
    """The shards that a rank must have, by name, see `Shards`. fp8_block: block size of a quantised destination, else None."""
    found: dict[str, ExpectedShard] = {}
    for weight, shard in shards_of(layout, arch, rank):
        filled = shard.shape[0] if weight.split != "vocab" else sum(piece.size[0] for piece in shard.pieces)
        block = fp8_block if weight.fp8 else None
        found[weight.megatron] = ExpectedShard(shard.shape, filled, None if block is None else FP8)
        if block is not None:
            scales = scale_shape(shard.shape, block)
            found[weight.megatron + SCALE_SUFFIX] = ExpectedShard(scales, scales[0], torch.float32)
    return found


def check_shards(role: str, rank: int | None, expected: Mapping[str, ExpectedShard], given: Shards | None) -> None:
    """Raise ValueError for shards on a rank without the role, or naming all that are missing or of wrong shape or dtype."""
    if rank is None and given:
        raise ValueError(f"shards were given for a {role}, which this rank is not")
    problems = []
    for name, (shape, _, dtype) in expected.items():
        tensor = None if given is None or name not in given else given[name]
        if tensor is None:
            problems.append(f"{name} is missing")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, but {shape} in the plan")
        elif tensor.dtype != dtype if dtype else tensor.dtype == FP8:
            problems.append(f"{name} is {tensor.dtype}, but must be {dtype or 'a type that is not quantised'}")
    if problems:
        raise ValueError(f"shards of {role} rank {rank} do not fit: {listed(problems, '; ')}")


def _clear_frames(error: BaseException) -> None:
    """Clear the frames of an error's traceback: they refer to unfinished messages, which would keep gloo's connections open."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__


class Transport:
    """Brings weights from training ranks to ranks, servers or files that use them. One object per rank; `sync` is a collective.

    The source's ranks are the wire's ranks from 0 on. The destination's ranks are the wire's ranks from `start` on (None: the
    destination has no ranks). fp8_block: block size of a quantised destination. Raises ValueError when the wire has another
    number of ranks.
    complete: the version that all ranks have confirmed. It is None before the first sync and during a sync. It stays None after
    a sync that failed midway, because the destination then has a mixture of versions.
    Buffers: `sources` are read and `destinations` are written in place between call and return of `sync`; both belong to the
    caller, before and after. The transport owns its buckets and frees them at the end of a sync.
    """

    def __init__(
        self,
        wire: Wire,
        arch: Architecture,
        source: WeightLayout,
        destination: WeightLayout | None = None,
        start: int = 0,
        fp8_block: int | None = None,
    ) -> None:
        receivers = 0 if destination is None else destination.world
        processes = max(source.world, start + receivers)
        if wire.world != processes:
            raise ValueError(f"the layouts need {processes} processes, the wire has {wire.world}")
        self.wire = wire
        self.complete: int | None = None
        self._memory = Memory(wire.device)
        self.source = wire.rank if wire.rank < source.world else None
        self.destination = wire.rank - start if 0 <= wire.rank - start < receivers else None
        self._expected_sources = {} if self.source is None else expected_shards(source, arch, self.source, None)
        self._expected_destinations: dict[str, ExpectedShard] = {}
        if destination is not None and self.destination is not None:
            self._expected_destinations = expected_shards(destination, arch, self.destination, fp8_block)

    @torch.no_grad()
    def sync(self, version: int, sources: Shards | None = None, destinations: Shards | None = None) -> None:
        """Transfer one version. A rank passes its shards for each role that the layouts give it: source, destination or both.

        Returns when every rank has confirmed that it has everything. Raises SyncError naming the ranks that are missing or
        failed, or the tensors whose checksums differ; the transport cannot be used after it.
        """
        board = self.wire.board
        board.start(version)
        try:
            check_shards("source", self.source, self._expected_sources, sources)
            check_shards("destination", self.destination, self._expected_destinations, destinations)
            board.barrier("begin")
            self.complete = None
            destinations = destinations or {}
            self._transfer(version, sources or {}, destinations)
            for name, expected in self._expected_destinations.items():
                if expected.filled < expected.shape[0]:
                    destinations[name][expected.filled :].zero_()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._memory.free()  # training and servers need the space
            board.barrier("end")
        except SyncError as error:
            _clear_frames(error)
            self.close()
            raise
        except BaseException as error:
            board.report(f"{type(error).__name__}: {error}")
            _clear_frames(error)
            self.close()
            if not isinstance(error, Exception):  # Ctrl-C and the like end this process
                raise
            raise board.failure() from error
        self.complete = version

    def _transfer(self, version: int, sources: Shards, destinations: Shards) -> None:
        """Fill the destinations, except for the padding rows of a vocabulary."""
        raise NotImplementedError

    def close(self) -> None:
        """Release connections and buckets."""
        self.wire.close()
        self._memory.free()
