"""How evenly a mixture's tokens are spread over its experts, over the tokens that an update trains on."""

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
    """Counts what the routers of this rank's chunks decide in passes that have a gradient.

    Log-probs are computed without one, and so is the first of two forward passes under recomputation: every token counts
    once. Padding and dummy sequences are routed, trained on by the balancing loss, and counted like other tokens.
    """

    def __init__(self, arch: Architecture, chunks: Sequence[torch.nn.Module], layout: Layout, *, tp_shares: bool) -> None:
        """tp_shares: whether tensor-parallel ranks have different tokens (sequence parallelism)."""
        assert arch.experts is not None
        self._mixtures = arch.expert_layers
        # Ranks that Megatron adds a microbatch's balancing loss up over, each with as many tokens.
        self._shares = layout.cp * (layout.tp if tp_shares else 1)
        # Of every layer the tokens of each expert, then all tokens, then the sum of tokens times this rank's part of the loss.
        self._sums = torch.zeros(arch.layers, arch.experts.count + 2, dtype=torch.float64, device=platform.device())
        for router in routers(chunks):
            router.register_forward_hook(self._count)

    def take(self) -> dict[str, float]:
        """Metrics of the passes since the last call, means over the layers with experts; a collective of the world.

        load_balancing_loss: Megatron's, 1 where all experts have the same share, without coefficient; the mean over tokens,
        which is what is trained on. Only where there is a coefficient. expert_load_imbalance: tokens of the layer's busiest
        expert over the mean.
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
        # Megatron adds losses up without their tokens. Taken out after every pass, each can be weighted by its own.
        tracked = get_moe_layer_wise_logging_tracker().get("load_balancing_loss")
        if tracked is not None:
            self._sums[layer, -1] += chosen.shape[0] * tracked["values"][layer]
            tracked["values"][layer] = 0.0
