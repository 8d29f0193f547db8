"""The entry point of `server_loader` for servers that die of an exception in a weight loader, as SGLang's do."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from etr_megatron.weights.transport import server_loader
from etr_megatron.weights.transport.board import SyncError

logger = logging.getLogger(__name__)


def load(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """See `server_loader.load`. A sync that did not complete is logged: the training ranks know it without being told. A worker
    that an offer is not for tells them so.

    The worker lives on, after a sync with a mixture of two versions, and must get a whole one before it serves. Other errors
    are raised.
    """
    named = list(named_tensors)
    try:
        server_loader.load(model, named)
    except SyncError as error:
        logger.error("%s", error)
    except server_loader.MisfitError as error:
        logger.error("%s", error)
        server_loader.Offer.read(dict(named)[server_loader.MESSAGE_NAME]).refuse(str(error))
