"""Weights from the ranks that train to the ranks that sample: transports behind one interface, see `Transport`."""

from etr_megatron.weights.transport.base import Transport
from etr_megatron.weights.transport.board import SyncError
from etr_megatron.weights.transport.buckets import Shards
from etr_megatron.weights.transport.disk import DiskWriter, version_directory
from etr_megatron.weights.transport.sharded import ShardedTransport
from etr_megatron.weights.transport.wire import Wire

__all__ = ["DiskWriter", "ShardedTransport", "Shards", "SyncError", "Transport", "Wire", "version_directory"]
