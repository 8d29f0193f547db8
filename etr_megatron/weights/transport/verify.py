"""Checks that what arrived is what its source holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from etr_megatron.weights.checksum import checksum
from etr_megatron.weights.plan import Plan, Transfer
from etr_megatron.weights.quantize import quantize_blocks
from etr_megatron.weights.transport.buckets import Shards, destination_box, source_box
from etr_megatron.weights.transport.exchange import Exchange
from etr_megatron.weights.transport.wire import Message, Wire


def compare(exchange: Exchange, sources: Shards, destinations: Shards) -> None:
    """Compare the checksum of every destination piece with its source's; a collective.

    Raises SyncError naming the first piece that differs. A destination's dtype must hold the sent values exactly.
    """
    plan, wire, start = exchange.plan, exchange.wire, exchange.plan.destination_start
    sends: list[Message] = []
    expected: dict[int, tuple[tuple[Transfer, ...], Tensor]] = {}
    for (source, destination), transfers in plan.pairs.items():
        if source == exchange.source:
            sums = torch.tensor([source_checksum(plan, t, sources, exchange.dtype) for t in transfers])
            if plan.is_local(source, destination):
                expected[source] = transfers, sums
            else:
                sends.append((sums.to(wire.device), start + destination))
        elif destination == exchange.destination:
            expected[source] = transfers, torch.empty(len(transfers), dtype=torch.int64, device=wire.device)
    receives = [(sums, source) for source, (_, sums) in expected.items() if source != wire.rank]
    wire.wait(wire.exchange(sends, receives))
    refuse_differing(
        wire,
        [
            transfer
            for transfers, sums in expected.values()
            for transfer, wanted in zip(transfers, sums.tolist(), strict=True)
            if destination_checksum(plan, transfer, destinations, exchange.dtype) != wanted
        ],
    )


def refuse_differing(wire: Wire, differing: Sequence[Transfer]) -> None:
    """Raise SyncError naming the first of these transfers, if there is one; in the end all ranks raise it."""
    if differing:
        first = differing[0]
        raise wire.board.fail(
            f"pieces that differ from their source after the transfer: {len(differing)}, first {first.weight.server} (of "
            f"{', '.join(first.weight.hf)}), {list(first.size)} from {list(first.destination_at)} on, sent by source rank "
            f"{first.source}"
        )


def piece_checksum(values: Tensor, scales: Tensor | None = None) -> int:
    """Checksum of a piece and of its scales."""
    return checksum(values) ^ (0 if scales is None else checksum(scales))


def destination_checksum(plan: Plan, transfer: Transfer, shards: Shards, dtype: torch.dtype) -> int:
    """Checksum of a piece as a destination holds it. dtype: of what is sent unquantised."""
    values = destination_box(transfer, shards)
    if plan.is_fp8(transfer.weight):
        return piece_checksum(values, destination_box(transfer, shards, plan.fp8_block))
    return piece_checksum(values.to(dtype))


def source_checksum(plan: Plan, transfer: Transfer, shards: Shards, dtype: torch.dtype) -> int:
    """Checksum of a piece as its source sends it. dtype: of unquantised values; the others are rounded to it first."""
    values = source_box(transfer, shards).to(dtype)
    if (block := plan.block_of(transfer.weight)) is not None:
        return piece_checksum(*quantize_blocks(values, block))
    return piece_checksum(values)
