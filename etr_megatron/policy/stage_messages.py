"""Messages between pipeline stages, whose shapes all stages know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection


class StageMessages(P2PCommunicator):
    """Receives hidden states and their gradients in the order of the schedule. For one run of it.

    Megatron's own communicator, with microbatches of different lengths, first exchanges the shapes of every message. The host
    then waits for the neighbour and for all work of its GPU, twice, before it can launch anything further. But each rank has
    the whole list of its microbatches, and every stage sends in the order of the same table.
    """

    def __init__(self, config: Any, rows: Sequence[int], chunks: int) -> None:
        """config: Megatron's. rows: number of rows of each microbatch's hidden states on this rank. chunks: of each stage."""
        super().__init__(mpu.get_pipeline_model_parallel_group(), config)
        table = get_schedule_table(len(rows), chunks, config.microbatch_group_size_per_vp_stage if chunks > 1 else len(rows))
        shapes = [[rows[number], 1, config.hidden_size] for number, _ in table]
        # The last stage sends the last chunk's output to no other, the first stage no gradient of the first chunk's input.
        but_ends = [shape for shape, (_, chunk) in zip(shapes, table, strict=True) if chunk < chunks - 1]
        self._outputs = iter(but_ends if mpu.is_pipeline_first_stage() else shapes)
        self._gradients = iter(but_ends if mpu.is_pipeline_last_stage() else shapes)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int] | None, list[int] | None]:
        """Shapes of what comes from the previous and from the next stage; both stages of a message call this once."""
        return next(self._outputs) if recv_prev else None, next(self._gradients) if recv_next else None


def process_groups() -> ProcessGroupCollection:
    """Megatron's own groups, which its schedules ask for together with a communicator."""
    groups = ProcessGroupCollection()
    groups.tp, groups.cp, groups.pp = (
        mpu.get_tensor_model_parallel_group(),
        mpu.get_context_parallel_group(),
        mpu.get_pipeline_model_parallel_group(),
    )
    groups.embd = mpu.get_embedding_group(check_initialized=False)
    groups.pos_embd = mpu.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = mpu.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return groups
