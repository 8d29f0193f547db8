"""Save Megatron's torch_dist format with torch's own distributed-checkpoint writer.

megatron-core's writer forks one process per file and returns results through a spawned manager: a writer that dies (a full
disk) leaves the parent waiting forever in `count_queue.join()`. torch's writer uses threads, raises any rank's failure on every
rank, and produces the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException

from etr_megatron.platform.files import disk_full_behind


class _Writer(dcp.FileSystemWriter):
    """torch's writer, with failures that keep their errno.

    torch.save reports a failed write as "unexpected pos" or "PytorchStreamWriter failed", with the OSError as its context;
    contexts are lost when torch gathers the failures of all ranks.
    """

    def write_data(self, *args: Any) -> Any:
        """Write; if the disk is full, raise the OSError itself, even if torch has wrapped it in another exception."""
        try:
            return super().write_data(*args)
        except Exception as error:
            full = disk_full_behind(error)
            if full is None or full is error:
                raise
            raise OSError(full.errno, full.strerror) from error


def disk_full_anywhere(error: BaseException) -> OSError | None:
    """The OSError of a full disk behind `error`, or behind a failure that it gathered from another rank; None without one."""
    failures = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else []
    return next((full for one in (error, *failures) if (full := disk_full_behind(one)) is not None), None)


class TorchDistSave(SaveShardedStrategy):
    """Synchronous save strategy for `dist_checkpointing.save`; `dist_checkpointing.load` reads the result as usual."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """ShardedObjects go through the same writer as tensors."""
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write all shards; a collective. Raises torch's CheckpointException on every rank, with the failures by rank."""
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=_Writer(checkpoint_dir, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def shared_among_replicas(strategy: SaveShardedStrategy) -> SaveShardedStrategy:
    """Wrap the strategy so that all data- and context-parallel ranks share the writing instead of leaving it to the first."""
    return FullyParallelSaveStrategyWrapper(strategy, parallel_state.get_data_parallel_group(with_context_parallel=True))
