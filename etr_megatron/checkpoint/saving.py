"""Save Megatron's torch_dist format with torch's own distributed-checkpoint writer.

megatron-core's writer forks one process per file and returns results through a spawned manager: a writer that dies (a full
disk) leaves the parent waiting forever in `count_queue.join()`. torch's writer uses threads, raises any rank's failure on every
rank, and produces the same files.

Collecting and writing are separate, so that a thread can write. torch's `dcp.async_save` also calls `dcp.save` in a thread. Its
stager copies tensors, but Megatron's shards reach it inside wrappers that have no tensor operations, so shards are copied here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from etr_megatron.platform.files import disk_full_behind


class _Writer(dcp.FileSystemWriter):
    """torch's writer, with failures that keep their errno.

    torch.save reports a failed write as "unexpected pos" or "PytorchStreamWriter failed", with the OSError as its context;
    contexts are lost when torch gathers the failures of all ranks.
    """

    def __init__(self, *args: Any, barrier: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._barrier = barrier

    def write_data(self, *args: Any) -> Any:
        """Write, then call `barrier`. If the disk is full, raise the OSError itself, even if torch has wrapped it.

        torch gathers the ranks' results next. Its gathering would not name a rank that is missing.
        """
        try:
            return super().write_data(*args)
        except Exception as error:
            full = disk_full_behind(error)
            if full is None or full is error:
                raise
            raise OSError(full.errno, full.strerror) from error
        finally:
            self._barrier()


def disk_full_anywhere(error: BaseException) -> OSError | None:
    """The OSError of a full disk behind `error`, or behind a failure that it gathered from another rank; None without one."""
    failures = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else []
    return next((full for one in (error, *failures) if (full := disk_full_behind(one)) is not None), None)


class TorchDistSave(SaveShardedStrategy):
    """Save strategy for `dist_checkpointing.save`, which only collects the shards that this rank is to write. `write` writes
    them; `dist_checkpointing.load` reads the result as usual.

    copies: whether the shards are copied to host memory, so that model and optimizer may change before `write` has returned.
    """

    def __init__(self, *, copies: bool) -> None:
        super().__init__("torch_dist", 1)
        self._copies = copies
        self._shards: dict[str, Any] = {}

    @property
    def can_handle_sharded_objects(self) -> bool:
        """ShardedObjects go through the same writer as tensors."""
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Collect this rank's shards. ShardedObjects are serialized here, which copies them."""
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        if self._copies:
            for part in chain.from_iterable(renamed.values()):
                if isinstance(part, ShardedTensor) and part.data is not None:
                    part.data = _host_copy(part.data)
        self._shards = mcore_to_pyt_state_dict(renamed, False)

    def write(self, folder: Path, group: dist.ProcessGroup | None = None, barrier: Callable[[], None] = lambda: None) -> None:
        """Write all shards; a collective of `group` (None: all ranks). Raises torch's CheckpointException on every rank, with
        the failures by rank. barrier: called on every rank after its shards are written or have failed."""
        # Copies are on the CPU. torch's overlapped copying would create a CUDA context in a thread, for the first GPU.
        ahead = {"per_thread_copy_ahead": 0} if self._copies else {}
        dcp.save(
            self._shards,
            storage_writer=_Writer(folder, thread_count=1, sync_files=True, barrier=barrier, **ahead),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy in CPU memory. It is not pinned: torch would keep pinned memory, as large as the rank's state, between saves."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def shared_among_replicas(strategy: SaveShardedStrategy) -> SaveShardedStrategy:
    """Wrap the strategy so that all data- and context-parallel ranks share the writing instead of leaving it to the first."""
    return FullyParallelSaveStrategyWrapper(strategy, parallel_state.get_data_parallel_group(with_context_parallel=True))
