"""Checks that the weights at the destinations equal those at the sources."""

from __future__ import annotations

import torch
from torch import Tensor

from etr_megatron.weights.checksum import checksum
from etr_megatron.weights.quantize import quantize_blocks
from etr_megatron.weights.reshard import ReshardPlan, Transfer
from etr_megatron.weights.transport.buckets import Shards, destination_box, source_box
from etr_megatron.weights.transport.exchange import Exchange
from etr_megatron.weights.transport.wire import Message


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
    differing = [
        transfer
        for transfers, sums in expected.values()
        for transfer, wanted in zip(transfers, sums.tolist(), strict=True)
        if destination_checksum(plan, transfer, destinations, exchange.dtype) != wanted
    ]
    if differing:
        first = differing[0]
        raise wire.board.fail(
            f"pieces that differ from their source after the transfer: {len(differing)}, first {first.weight.server} (of "
            f"{', '.join(first.weight.hf)}), {list(first.size)} from {list(first.destination_at)} on, sent by source rank "
            f"{first.source}"
        )


def destination_checksum(plan: ReshardPlan, transfer: Transfer, shards: Shards, dtype: torch.dtype) -> int:
    """Checksum of a piece as a destination holds it. dtype: of values that are sent unquantised."""
    values = destination_box(transfer, shards)
    if (block := plan.block_of(transfer.weight)) is not None:
        return checksum(values) ^ checksum(destination_box(transfer, shards, block))
    return checksum(values.to(transfer.weight.type_in(dtype)))


def source_checksum(plan: ReshardPlan, transfer: Transfer, shards: Shards, dtype: torch.dtype) -> int:
    """Checksum of a piece as its source sends it. dtype: of unquantised values; others are rounded to it first."""
    values = source_box(transfer, shards).to(transfer.weight.type_in(dtype))
    if (block := plan.block_of(transfer.weight)) is not None:
        values, scales = quantize_blocks(values, block)
        return checksum(values) ^ checksum(scales)
    return checksum(values)
