"""Peak memory of tensors while a function runs, counted from the storages that operators create."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Storages of all dense tensors; a sparse one has none, and its parts were returned by earlier operators."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [leaf.untyped_storage() for leaf in leaves if leaf.layout == torch.strided]


class Storages(TorchDispatchMode):
    """peak: most bytes alive at once in tensors created inside, since the last `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if storage._cdata not in given:
                self._count(storage)
        return found

    def restart(self) -> int:
        """Restart the peak; returns the bytes alive now."""
        self.peak = self._now
        return self._now

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._alive.pop(key)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes alive at once in tensors created inside `function`; temporaries inside an operator are not counted."""
    with Storages() as storages:
        function()
    return storages.peak
