"""Hold back the threads that write asynchronous checkpoints, so that what happens meanwhile does not depend on speed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from etr_megatron.checkpoint.saving import TorchDistSave

_write = TorchDistSave.write


@contextmanager
def held_back() -> Iterator[None]:
    """Threads that begin to write inside the block wait until it ends."""
    is_over = threading.Event()

    def late(shards: TorchDistSave, *arguments: Any) -> None:
        is_over.wait()
        _write(shards, *arguments)

    with patch.object(TorchDistSave, "write", late):
        try:
            yield
        finally:
            is_over.set()
