"""Replay the rollout engine's choice of experts in training (Rollout Routing Replay, arXiv 2510.11370).

A router's choice is a step function: engine and trainer round differently and so choose different experts for some tokens,
whose log-probs then jump. With the engine's choice both compute the same function, in every update of a step. The router still
computes the weights of the chosen experts itself, and receives their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from etr_megatron import platform
from etr_megatron.policy.context import own_ranges
from etr_megatron.policy.packing import Microbatch
from etr_megatron.policy.parallel import Layout
from etr_megatron.weights import Architecture

TopK = Callable[..., tuple[Tensor, Tensor]]

PIECE = 64 << 20
"""Bytes per broadcast; a larger sample is sent whole."""


@dataclass(frozen=True)
class StepRouting:
    """The experts that the engine chose for N samples. Those of a step take gigabytes. So only rank 0 holds all of them, and
    before a pass each rank gets the experts of its own samples and layers.

    lengths: number of leading tokens of each sample with known experts; on every rank.
    chosen: on rank 0, per sample uint8 [length, MoE layers, experts per token]; None elsewhere.
    """

    lengths: tuple[int, ...]
    chosen: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, chosen: Sequence[Tensor]) -> StepRouting:
        """Build from `chosen`, on rank 0. Other ranks get the result of `without_chosen`."""
        return cls(tuple(map(len, chosen)), tuple(chosen))

    def without_chosen(self) -> StepRouting:
        """The form for ranks other than 0."""
        return StepRouting(self.lengths, None)

    def select(self, numbers: Sequence[int]) -> StepRouting:
        """The routing of the samples `numbers`, in that order."""
        chosen = None if self.chosen is None else tuple(self.chosen[i] for i in numbers)
        return StepRouting(tuple(self.lengths[i] for i in numbers), chosen)

    def distribute(self, samples: Collection[int], layers: Sequence[int], shape: tuple[int, int]) -> dict[int, Tensor]:
        """The routing that this rank needs: for each of `samples` uint8 [length, len(layers), experts per token], on the CPU.

        shape: (MoE layers of the model, experts per token). A collective: rank 0 broadcasts everything, and each rank keeps
        only what it needs.
        """
        found = {}
        for numbers in self._pieces(PIECE // math.prod(shape)):
            sizes = [self.lengths[i] * math.prod(shape) for i in numbers]
            if self.chosen is None:
                piece = torch.empty(sum(sizes), dtype=torch.uint8, device=platform.device())
            else:
                piece = torch.cat([self.chosen[i].flatten() for i in numbers]).to(platform.device())
            if len(piece) and dist.get_world_size() > 1:  # empty if no routing is known
                dist.broadcast(piece, src=0)
            for i, part in zip(numbers, piece.split(sizes), strict=True):
                if i in samples:
                    found[i] = part.view(-1, *shape)[:, layers].cpu()
        return found

    def _pieces(self, most: int) -> Iterator[list[int]]:
        """Consecutive samples to broadcast together: at most `most` tokens, or one sample."""
        piece: list[int] = []
        tokens = 0
        for number, length in enumerate(self.lengths):
            if piece and tokens + length > most:
                yield piece
                piece, tokens = [], 0
            piece.append(number)
            tokens += length
        yield piece


def routers(chunks: Sequence[torch.nn.Module]) -> Iterator[TopKRouter]:
    """The routers of all MoE layers in a stage's chunks."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, TopKRouter))


def _layer_of(router: TopKRouter) -> int:
    """Which layer of the model, from 0."""
    number: Any = router.layer_number  # the type checker only knows its initial None
    return int(number) - 1


class ReplayTargets(NamedTuple):
    """The given experts of a microbatch's tokens, for one rank.

    experts: uint8 [tokens that this rank routes, its MoE layers, experts per token]. known: bool [tokens]; for the others,
    `experts` has no meaning: after a sample's known tokens, in padding and in dummy sequences.
    """

    experts: Tensor
    known: Tensor


class RoutingReplay:
    """Makes the routers of a stage's chunks use given experts, pass by pass.

    Replaces Megatron's `RouterReplay`, which must be set to forward or backward before every pass. Here each router counts
    passes: microbatches reach a layer in a fixed order, and recomputation repeats that order.
    """

    def __init__(self, arch: Architecture, chunks: Sequence[torch.nn.Module], layout: Layout, *, tp_shares: bool) -> None:
        """tp_shares: whether tensor-parallel ranks have different tokens (sequence parallelism)."""
        assert arch.experts is not None
        mixtures = arch.expert_layers
        self._shape = len(mixtures), arch.experts.per_token
        self._layout, self._tp_shares = layout, tp_shares
        self._targets: list[ReplayTargets] | None = None
        self._latest: tuple[int, ReplayTargets] | None = None
        self._own = [mixtures.index(_layer_of(router)) for router in routers(chunks)]
        self._layers = [_Layer(self, place) for place in range(len(self._own))]
        for router, layer in zip(routers(chunks), self._layers, strict=True):
            router.router_replay = layer  # type: ignore[assignment]  # in the place of Megatron's

    @contextmanager
    def replaying(self, micro: Sequence[Microbatch], routing: StepRouting | None) -> Iterator[None]:
        """Context for the passes over these microbatches. routing: the step's, which the microbatches index by sample; None
        lets the routers choose. A collective if routing is given."""
        if routing is not None:
            samples = {sample for batch in micro for sample in batch.samples}
            received = routing.distribute(samples, self._own, self._shape)
            # Before the passes: reading the offsets waits for the device, which would later wait for the copies on the host.
            self._targets = [self._targets_of(batch, received) for batch in micro]
        for layer in self._layers:
            layer.begin()
        try:
            yield
        finally:  # free gigabytes: the next step's routing arrives before its passes
            self._targets, self._latest = None, None

    @property
    def is_replaying(self) -> bool:
        """Whether routers must use given experts now."""
        return self._targets is not None

    def targets(self, number: int) -> ReplayTargets:
        """The experts of microbatch `number`, on the device."""
        assert self._targets is not None
        if self._latest is None or self._latest[0] != number:  # a pass asks once per layer
            self._latest = number, ReplayTargets(*map(platform.to_device, self._targets[number]))
        return self._latest[1]

    def _targets_of(self, batch: Microbatch, received: dict[int, Tensor]) -> ReplayTargets:
        """The experts of a microbatch, from those of its samples, which are taken out of `received`."""
        layout = self._layout
        share = batch.tokens.shape[1] // (layout.tp if self._tp_shares else 1)
        first = share * layout.tp_rank if self._tp_shares else 0
        pinned = platform.uses_cuda()
        experts = torch.empty(share, len(self._own), self._shape[1], dtype=torch.uint8, pin_memory=pinned)
        known = torch.zeros(share, dtype=torch.bool, pin_memory=pinned)
        at = -first  # where the next part begins, counted from this rank's first token
        lengths = batch.cu_seqlens.diff().tolist()
        for sample, length in zip(batch.samples, lengths, strict=False):  # a dummy sequence may follow
            routing = received.pop(sample)
            for part in own_ranges(length, layout.cp, layout.cp_rank):
                begin, end = max(at, 0), min(at + min(part.stop, len(routing)) - part.start, share)
                if begin < end:
                    experts[begin:end] = routing[part.start + begin - at : part.start + end - at]
                    known[begin:end] = True
                at += len(part)
        return ReplayTargets(experts, known)


class _Layer:
    """What a router calls in place of Megatron's `RouterReplay`. index: among this rank's MoE layers."""

    def __init__(self, owner: RoutingReplay, index: int) -> None:
        self._owner, self._index = owner, index
        self._passes = {True: 0, False: 0}

    def begin(self) -> None:
        """Reset the pass counts."""
        self._passes = {True: 0, False: 0}

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, choose: TopK
    ) -> tuple[Tensor, Tensor]:
        """From scores [T, experts]: (scores of the chosen experts [T, topk], their indices, int64 [T, topk])."""
        own, chosen = choose(scores, topk, num_groups, group_topk)
        if not self._owner.is_replaying:
            return own, chosen
        # Count passes with and without gradients separately: recomputation runs one of each per microbatch.
        with_gradient = torch.is_grad_enabled()
        experts, known = self._owner.targets(self._passes[with_gradient])
        self._passes[with_gradient] += 1
        chosen = torch.where(known[:, None], experts[:, self._index].long(), chosen)
        return scores.gather(1, chosen), chosen
