"""Weights from the ranks that train to the ranks that sample: transports behind one interface, see `Transport`."""

from etr_megatron.weights.quantize import SCALE_SUFFIX
from etr_megatron.weights.transport.board import SyncError
from etr_megatron.weights.transport.broadcast import BroadcastTransport
from etr_megatron.weights.transport.buckets import Shards
from etr_megatron.weights.transport.disk import DiskReader, DiskWriter, version_directory
from etr_megatron.weights.transport.interface import Transport, Versions
from etr_megatron.weights.transport.sharded import ShardedTransport
from etr_megatron.weights.transport.wire import Wire

__all__ = [
    "SCALE_SUFFIX",
    "BroadcastTransport",
    "DiskReader",
    "DiskWriter",
    "ShardedTransport",
    "Shards",
    "SyncError",
    "Transport",
    "Versions",
    "Wire",
    "version_directory",
]
