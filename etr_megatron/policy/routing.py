"""The experts that the rollout engine chose, chosen again in training (Rollout Routing Replay, arXiv 2510.11370).

A router's choice is a step function: engine and trainer, which round differently, choose other experts for some tokens, and a
token's log-prob then jumps. With the engine's choice both compute the same function, and every update of a step the same one.
What a router gives to the chosen experts is still its own, and so is the gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from etr_megatron import platform
from etr_megatron.policy.packing import Microbatch
from etr_megatron.policy.parallel import Layout
from etr_megatron.weights import Architecture

TopK = Callable[..., tuple[Tensor, Tensor]]

PIECE = 64 << 20
"""Bytes that are handed out at a time, or a sample's where it has more."""


@dataclass(frozen=True)
class StepRouting:
    """The experts that the engine chose for N samples. Of a step they are gigabytes: rank 0 has them, and a pass's ranks get
    those of their own samples and layers.

    lengths: for how many of its first tokens a sample's are known; on every rank.
    chosen: on rank 0 per sample uint8 [length, layers with experts, experts of a token]; None elsewhere.
    """

    lengths: tuple[int, ...]
    chosen: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, chosen: Sequence[Tensor]) -> StepRouting:
        """chosen: see there; on rank 0, from which the others get it `without_chosen`."""
        return cls(tuple(map(len, chosen)), tuple(chosen))

    def without_chosen(self) -> StepRouting:
        """As other ranks than 0 have it."""
        return StepRouting(self.lengths, None)

    def select(self, numbers: Sequence[int]) -> StepRouting:
        """Of the samples `numbers`, in their order."""
        chosen = None if self.chosen is None else tuple(self.chosen[i] for i in numbers)
        return StepRouting(tuple(self.lengths[i] for i in numbers), chosen)

    def hand_out(self, samples: Collection[int], layers: Sequence[int], shape: tuple[int, int]) -> dict[int, Tensor]:
        """What this rank asks for: of each of `samples` uint8 [length, len(layers), experts of a token], on the CPU.

        shape: (layers with experts of the model, experts of a token). A collective: all is sent to all, and what a rank has not
        asked for is not kept.
        """
        found = {}
        for numbers in self._pieces(PIECE // math.prod(shape)):
            sizes = [self.lengths[i] * math.prod(shape) for i in numbers]
            if self.chosen is None:
                piece = torch.empty(sum(sizes), dtype=torch.uint8, device=platform.device())
            else:
                piece = torch.cat([self.chosen[i].flatten() for i in numbers]).to(platform.device())
            if len(piece) and dist.get_world_size() > 1:  # nothing may be known of any of them
                dist.broadcast(piece, src=0)
            for i, part in zip(numbers, piece.split(sizes), strict=True):
                if i in samples:
                    found[i] = part.view(-1, *shape)[:, layers].cpu()
        return found

    def _pieces(self, most: int) -> Iterator[list[int]]:
        """Consecutive samples that are handed out together: of `most` tokens, or one."""
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
    """Of all layers with experts of a stage's chunks."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, TopKRouter))


def _layer_of(router: TopKRouter) -> int:
    """Which layer of the model, from 0."""
    number: Any = router.layer_number  # to the type checker nothing but the None that it is made with
    return int(number) - 1


class RoutingReplay:
    """Has the routers of a stage's chunks choose what they are told to, pass by pass.

    Takes the place of Megatron's `RouterReplay`, which has to be told before every pass whether it goes forward or backward;
    here a router counts: microbatches come to a layer in one order, and once more in that order where recomputation does.
    """

    def __init__(self, arch: Architecture, chunks: Sequence[torch.nn.Module], layout: Layout, *, tp_shares: bool) -> None:
        """tp_shares: whether tensor-parallel ranks have different tokens (sequence parallelism)."""
        assert arch.experts is not None
        mixtures = arch.expert_layers
        self._shape = len(mixtures), arch.experts.per_token
        self._layout, self._tp_shares = layout, tp_shares
        self._places: list[_Places] = []
        self._routing: dict[int, Tensor] | None = None
        self._latest: tuple[int, Tensor] | None = None
        self._own = [mixtures.index(_layer_of(router)) for router in routers(chunks)]
        self._layers = [_Layer(self, place) for place in range(len(self._own))]
        for router, layer in zip(routers(chunks), self._layers, strict=True):
            router.router_replay = layer  # type: ignore[assignment]  # in the place of Megatron's

    @contextmanager
    def replaying(self, micro: Sequence[Microbatch], routing: StepRouting | None) -> Iterator[None]:
        """The passes of these microbatches are made while the block lasts. routing: of the samples that they number; None: the
        routers choose themselves. A collective, where there is one."""
        # Read once, before the passes: every reading waits for the device.
        self._places = [] if routing is None else [_Places.of(batch, self._layout.cp) for batch in micro]
        if routing is not None:
            self._routing = routing.hand_out({sample for batch in micro for sample in batch.samples}, self._own, self._shape)
        for layer in self._layers:
            layer.begin()
        try:
            yield
        finally:  # the next step's come, gigabytes again, before there are passes again
            self._places, self._routing, self._latest = [], None, None

    @property
    def is_told(self) -> bool:
        """Whether the routers have a choice made for them."""
        return self._routing is not None

    def told(self, number: int) -> Tensor:
        """Of microbatch `number`: int16 [tokens that this rank routes, its layers with experts, experts of a token]; -1 where
        nothing is known: what comes after a sample's known tokens, padding and dummy sequences."""
        if self._latest is None or self._latest[0] != number:  # a pass asks layer by layer
            self._latest = number, self._of_this_rank(self._places[number]).to(platform.device())
        return self._latest[1]

    def _of_this_rank(self, places: _Places) -> Tensor:
        assert self._routing is not None
        found = torch.full((len(places.positions), len(self._own), self._shape[1]), -1, dtype=torch.int16)
        for sample, (begin, end) in zip(places.samples, itertools.pairwise(places.offsets), strict=False):
            routing, own = self._routing[sample], places.positions[begin:end]
            known = own < len(routing)
            found[begin:end][known] = routing[own[known]].to(torch.int16)
        return found.chunk(self._layout.tp)[self._layout.tp_rank] if self._tp_shares else found


@dataclass(frozen=True)
class _Places:
    """Where a context-parallel rank's tokens of a microbatch are from: their places in their sequences [T], and where each
    sequence begins among them; `samples` number the sequences, of which a dummy may come last."""

    samples: Sequence[int]
    positions: Tensor
    offsets: list[int]

    @classmethod
    def of(cls, batch: Microbatch, cp: int) -> _Places:
        """Of a microbatch, whose `cu_seqlens` are of all `cp` ranks' tokens."""
        return cls(batch.samples, batch.positions[0].cpu(), [offset // cp for offset in batch.cu_seqlens.tolist()])


class _Layer:
    """What a router asks, as Megatron asks its own `RouterReplay`. index: among this rank's layers with experts."""

    def __init__(self, owner: RoutingReplay, index: int) -> None:
        self._owner, self._index = owner, index
        self._passes = {True: 0, False: 0}

    def begin(self) -> None:
        """No microbatch has come yet."""
        self._passes = {True: 0, False: 0}

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, choose: TopK
    ) -> tuple[Tensor, Tensor]:
        """scores [T, experts]: (those of the chosen [T, topk], the chosen, int64 [T, topk])."""
        own, chosen = choose(scores, topk, num_groups, group_topk)
        if not self._owner.is_told:
            return own, chosen
        # Passes with and without a gradient are counted apart: recomputation has one of each for every microbatch.
        with_gradient = torch.is_grad_enabled()
        told = self._owner.told(self._passes[with_gradient])[:, self._index].long()
        self._passes[with_gradient] += 1
        chosen = torch.where(told < 0, chosen, told)
        return scores.gather(1, chosen), chosen
