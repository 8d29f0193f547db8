"""What the transports over a wire have in common: roles, begin and end, and errors that reach every rank."""

from __future__ import annotations

import traceback

import torch

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.layout import Placement, shards_of
from etr_megatron.weights.quantize import scale_shape
from etr_megatron.weights.transport.board import SyncError
from etr_megatron.weights.transport.buckets import SCALE_SUFFIX, Shards
from etr_megatron.weights.transport.interface import Versions
from etr_megatron.weights.transport.wire import Wire

Shapes = dict[str, tuple[tuple[int, ...], int]]
"""Name -> shape, and the rows from the top that are not padding."""


def _shapes_of(placement: Placement, arch: Architecture, rank: int | None, fp8_block: int | None) -> Shapes:
    """What a rank's shards look like; none without a rank."""
    found: Shapes = {}
    for weight, shard in shards_of(placement, arch, rank) if rank is not None else ():
        filled = shard.shape[0] if weight.split != "vocab" else sum(piece.size[0] for piece in shard.pieces)
        found[weight.megatron] = shard.shape, filled
        if fp8_block is not None and weight.fp8:
            scales = scale_shape(*shard.shape, fp8_block)
            found[weight.megatron + SCALE_SUFFIX] = scales, scales[0]
    return found


def _check_shapes(role: str, rank: int | None, wanted: Shapes, given: Shards | None) -> None:
    """Raises ValueError for shards without the role, or for one that is missing or of another shape."""
    if rank is None and given:
        raise ValueError(f"shards were given for a {role}, which this rank is not")
    for name, (shape, _) in wanted.items():
        if given is None or name not in given:
            raise ValueError(f"{role} rank {rank} lacks {name}")
        if tuple(given[name].shape) != shape:
            raise ValueError(f"{name} of {role} rank {rank} is {tuple(given[name].shape)}, the plan says {shape}")


def _let_go(error: BaseException) -> None:
    """Clear the frames that an error came through: messages under way in them would keep gloo's connections open."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__


class CollectiveTransport:
    """A transport all of whose ranks meet on a wire: the source's from process 0, the destination's from `start`."""

    def __init__(
        self, wire: Wire, arch: Architecture, source: Placement, destination: Placement, start: int, fp8_block: int | None
    ) -> None:
        processes = max(source.world, start + destination.world)
        if wire.world != processes:
            raise ValueError(f"the layouts need {processes} processes, the wire has {wire.world}")
        self.wire, self.versions = wire, Versions()
        self.source = wire.rank if wire.rank < source.world else None
        self.destination = wire.rank - start if 0 <= wire.rank - start < destination.world else None
        self._source_shapes = _shapes_of(source, arch, self.source, None)
        self._destination_shapes = _shapes_of(destination, arch, self.destination, fp8_block)

    @torch.no_grad()
    def sync(self, version: int, sources: Shards | None = None, destinations: Shards | None = None) -> None:
        """See `Transport.sync`."""
        board = self.wire.board
        board.start(version)
        try:
            _check_shapes("source", self.source, self._source_shapes, sources)
            _check_shapes("destination", self.destination, self._destination_shapes, destinations)
            board.meet("begin")
            self.versions.begin(version)
            self._transfer(sources or {}, destinations or {})
            for name, (shape, filled) in self._destination_shapes.items():
                if filled < shape[0]:
                    destinations[name][filled:].zero_()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            board.meet("end")
        except SyncError as error:
            _let_go(error)
            self.close()
            raise
        except Exception as error:
            _let_go(error)
            self.close()
            raise board.fail(f"{type(error).__name__}: {error}") from error
        self.versions.end(version)

    def _transfer(self, sources: Shards, destinations: Shards) -> None:
        """Fill the destinations, all but a vocabulary's padding."""
        raise NotImplementedError

    def close(self) -> None:
        """See `Transport.close`."""
        self.wire.close()
