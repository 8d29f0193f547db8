"""Report errors raised by a custom policy loss."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from etr_megatron.errors import UserError


@contextmanager
def attributed_to_loss(name: str, where: str = "") -> Iterator[None]:
    """Turn an exception of the body, a single call, into a UserError with the loss's name and the traceback below that call.

    where: text between `raised` and the error. sys.exit counts as an exception: it would end the rank as if its work were done.
    A `UserError` passes, and so do errors from torch.distributed, where another rank has failed.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if _is_a_messages(error):
            raise
        frames = list(_frames(error))
        below = frames[2] if len(frames) > 2 else None  # skip the frames of this file and of the call
        trace = "".join(traceback.format_exception(type(error), error, below)).rstrip()
        raise UserError(f"objective.loss {name} raised {where}{type(error).__name__}: {error}\n{trace}") from error


def _frames(error: BaseException) -> Iterator[TracebackType]:
    at = error.__traceback__
    while at is not None:
        yield at
        at = at.tb_next


def _is_a_messages(error: BaseException) -> bool:
    modules = (frame.tb_frame.f_globals.get("__name__", "") for frame in _frames(error))
    return any(module.startswith("torch.distributed.") for module in modules)
