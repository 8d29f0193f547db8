"""Work that every rank does a part of, and that fails on all ranks if it fails on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from etr_megatron.errors import UserError
from etr_megatron.platform.files import disk_full_behind
from etr_megatron.platform.phases import StopAskedError

T = TypeVar("T")


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on every rank of the group (None: all), wait for the others and return this rank's result. A collective.

    Raises this rank's own error or, if only others failed, the first of theirs: a UserError or StopAskedError as such, a full
    disk as OSError, anything else as RuntimeError. Without torch.distributed it only runs `work`.
    """
    if not dist.is_initialized():
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as failed:
        error = failed
    failures: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, None if error is None else _for_others(error), group=group)
    error = error or next((failure for failure in failures if failure is not None), None)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _for_others(error: Exception) -> Exception:
    """The error in a form that can be pickled to ranks that lack its class."""
    if isinstance(error, UserError):  # before the next: it may have been raised from a full disk's
        return UserError(str(error))
    full = disk_full_behind(error)
    if full is not None:
        return OSError(full.errno, full.strerror)
    if isinstance(error, StopAskedError):
        return StopAskedError(str(error))
    return RuntimeError(f"rank {dist.get_rank()} failed: {error}")
