"""What SGLang's experts lack on CPU: expert parallelism in their torch path, and memory for routed experts without CUDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def skip_experts_of_other_ranks() -> None:
    """Make the torch path skip experts of other ranks, as SGLang's GPU kernels do.

    The dispatcher marks those experts with -1 (`token_dispatcher/standard.py`); the rank that has the expert adds its result,
    in the sum over ranks that follows. The torch path counts tokens per expert with -1 as an index, and crashes
    (`fused_moe_native.py`, 0.5.21). Here it gets only the rank's own (token, expert) pairs, as tokens with one expert each.
    """
    from sglang.srt.layers.moe import fused_moe_native

    of_own = fused_moe_native.moe_forward_native

    def of_any(layer: Any, tokens: Tensor, chosen: Any, config: Any) -> Tensor:
        """layer: the rank's experts. tokens [T, H]. chosen: topk_ids and topk_weights [T, K], ids local or -1. -> [T, H]."""
        is_own = chosen.topk_ids >= 0
        if is_own.all():
            return of_own(layer, tokens, chosen, config)
        found, rows = tokens.new_zeros(tokens.shape), is_own.nonzero()[:, 0]
        if len(rows):
            one_each = {name: getattr(chosen, name)[is_own].unsqueeze(1) for name in ("topk_ids", "topk_weights")}
            found.index_add_(0, rows, of_own(layer, tokens[rows], chosen._replace(**one_each), config))
        return found

    fused_moe_native.moe_forward_native = of_any


def leave_host_memory_unpinned() -> None:
    """Make SGLang keep routed experts (`--enable-return-routed-experts`) in plain host memory.

    By default it registers that memory with CUDA, which is not available (`mem_cache/pool_host/common.py`, 0.5.21).
    """
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS, alloc_with_host_register

    ALLOC_MEMORY_FUNCS["cpu"] = lambda *sizes, **options: alloc_with_host_register(*sizes, **{**options, "pin_memory": False})
