"""Stand-in for SGLang's kernel package on machines without a GPU: the one function that its CPU engine calls, in torch.

It registers no `torch.ops.sgl_kernel`, so SGLang uses its own torch path for every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__version__ = "0.0.0"


def assign_req_to_token_pool_cpu(
    rows: Tensor, table: Tensor, begins: Tensor, ends: Tensor, locations: Tensor, *_rest: Any
) -> None:
    """table[row, begin:end] = the next (end - begin) of `locations`, request by request; in place, in the server's table."""
    taken = 0
    for row, begin, end in zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True):
        table[row, begin:end] = locations[taken : taken + end - begin].to(table.dtype)
        taken += end - begin


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("_"):
        raise AttributeError(name)

    def missing(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on CPU")

    return missing
