"""Expert load balance over the tokens that an update trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor

from etr_megatron import platform
from etr_megatron.policy.parallel import Layout
from etr_megatron.policy.routing import routers
from etr_megatron.weights import Architecture


class ExpertBalance:
    """Counts the routing decisions of this rank's chunks in passes with gradients enabled.

    Gradients are disabled for log-probs and for the first of the two forward passes under recomputation, so every token counts
    once. Padding and dummy sequences are routed, enter the balancing loss and count like other tokens.
    """

    def __init__(self, arch: Architecture, chunks: Sequence[torch.nn.Module], layout: Layout, *, tp_shares: bool) -> None:
        """tp_shares: whether tensor-parallel ranks have different tokens (sequence parallelism)."""
        assert arch.experts is not None
        self._mixtures = arch.expert_layers
        # Number of ranks over which Megatron sums a microbatch's balancing loss; each has equally many tokens.
        self._shares = layout.cp * (layout.tp if tp_shares else 1)
        # Per layer: tokens of each expert, all tokens, and the sum of tokens times this rank's share of the loss.
        self._sums = torch.zeros(arch.layers, arch.experts.count + 2, dtype=torch.float64, device=platform.device())
        for router in routers(chunks):
            router.register_forward_hook(self._count)

    def take(self) -> dict[str, float]:
        """Metrics of the passes since the last call, means over the layers with experts; a collective of the world.

        load_balancing_loss: Megatron's loss without its coefficient, averaged over tokens as in training; 1 means equal load.
        Only present if the coefficient is not 0. expert_load_imbalance: tokens of a layer's busiest expert over the mean.
        """
        dist.all_reduce(self._sums)
        counts, tokens, weighted = self._sums[self._mixtures].cpu().tensor_split((-2, -1), dim=1)
        self._sums.zero_()
        found = {"expert_load_imbalance": (counts.amax(1) / counts.mean(1)).mean().item()}
        if bool(weighted.any()):
            found["load_balancing_loss"] = (self._shares * weighted / tokens).mean().item()
        return found

    def _count(self, router: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        chosen, layer = output[1], router.layer_number - 1
        self._sums[layer, :-2] += chosen.sum(0)
        self._sums[layer, -2] += chosen.shape[0]
        # Megatron sums losses over passes without weights. We read and zero the tracker after every pass to weight by tokens.
        tracked = get_moe_layer_wise_logging_tracker().get("load_balancing_loss")
        if tracked is not None:
            self._sums[layer, -1] += chosen.shape[0] * tracked["values"][layer]
            tracked["values"][layer] = 0.0
