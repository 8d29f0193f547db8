"""Run work on all ranks. If it fails on one rank, it fails on all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from etr_megatron.errors import UserError
from etr_megatron.platform.files import disk_full_behind
from etr_megatron.platform.phases import StopAskedError

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on every rank of the group (None: all), wait for the others and return this rank's result. A collective.

    Raises this rank's own error. If only others failed, raises the error of the first of them: a UserError or StopAskedError
    with its class, a full disk as OSError, anything else as RuntimeError. Without torch.distributed it only runs `work`.
    """
    if not dist.is_initialized():
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as failed:
        error = failed
    failures: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, None if error is None else picklable_error(error), group=group)
    error = error or next((failure for failure in failures if failure is not None), None)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def picklable_error(error: Exception, *, keep_class: bool = False) -> Exception:
    """The error in a form that can be pickled and sent to other ranks, which may not be able to import its class.

    keep_class: keep the error unchanged if its class is a builtin or of this package and it survives pickling, for callers that
    distinguish errors by class.
    """
    if keep_class and _survives_pickling(error):
        return error
    if isinstance(error, UserError):  # first: its cause may be the OSError of a full disk
        return UserError(str(error))
    full = disk_full_behind(error)
    if full is not None:
        return OSError(full.errno, full.strerror)
    if isinstance(error, StopAskedError):
        return StopAskedError(str(error))
    return RuntimeError(f"rank {dist.get_rank()} failed: {error}")


def _survives_pickling(error: Exception) -> bool:
    """Whether the error is the same after pickling. It is not if its class takes other arguments than a text."""
    if type(error).__module__.partition(".")[0] not in ("builtins", "etr_megatron"):
        return False
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # the class, or an object in the error, may fail in any way
        return False
    return type(copy) is type(error) and str(copy) == str(error)
