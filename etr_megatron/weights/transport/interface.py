"""The interface of every transport, and how a receiver knows which version it holds."""

from __future__ import annotations

from typing import Protocol

from etr_megatron.weights.transport.board import SyncError
from etr_megatron.weights.transport.buckets import Shards


class Versions:
    """Which version of the weights a receiver holds.

    complete: the version that all ranks have agreed is complete, None before the first one and during a sync. begun: the
    version whose sync began last. So a failed sync leaves `complete` None; `require` guards the use of the weights.
    """

    def __init__(self) -> None:
        self.complete: int | None = None
        self.begun: int | None = None

    def begin(self, version: int) -> None:
        """The weights are being overwritten from now on."""
        self.complete, self.begun = None, version

    def end(self, version: int) -> None:
        """All weights have arrived everywhere."""
        self.complete = version

    def require(self) -> int:
        """The complete version; raises SyncError when there is none."""
        if self.complete is None:
            state = "none was received" if self.begun is None else f"the sync of version {self.begun} did not complete"
            raise SyncError(f"there is no complete version of the weights: {state}")
        return self.complete


class Transport(Protocol):
    """Brings the weights from training ranks to ranks that use them. One object per rank; `sync` is a collective.

    Buffers: `sources` are read and `destinations` are written in place between call and return; both belong to the caller,
    before and after. The transport owns its buckets and keeps them for the next sync.
    """

    versions: Versions

    def sync(self, version: int, sources: Shards | None = None, destinations: Shards | None = None) -> None:
        """Transfer one version. A rank passes its shards for the role, or both roles, that the plan gives it.

        Returns when every rank has confirmed that it has everything; only then is the version complete. Raises SyncError naming
        the ranks that are missing or failed, or the tensors whose checksums differ; the transport cannot be used after it. A
        destination's shards then hold a mixture of versions, and `versions.complete` is None.
        """
        ...

    def close(self) -> None:
        """Release connections and buckets."""
        ...
