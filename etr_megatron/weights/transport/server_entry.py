"""The entry point of `server_loader` for servers that crash on an exception in a weight loader, as SGLang does."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from etr_megatron.weights.transport import server_loader
from etr_megatron.weights.transport.board import SyncError

logger = logging.getLogger(__name__)


def load(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """See `server_loader.load`. A sync that did not complete is only logged, as the training ranks know of it. Parameters that
    do not match the offer are reported to them.

    The worker survives, after an incomplete sync with a mixture of two versions, and must get a complete one before it serves.
    Other errors are raised.
    """
    named = list(named_tensors)
    try:
        server_loader.load(model, named)
    except SyncError as error:
        logger.error("%s", error)
    except server_loader.MisfitError as error:
        logger.error("%s", error)
        server_loader.Offer.read(dict(named)[server_loader.MESSAGE_NAME]).refuse(str(error))
