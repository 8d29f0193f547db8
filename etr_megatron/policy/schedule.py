"""Megatron's pipeline schedules over packed microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from etr_megatron.policy.model import forget_routing
from etr_megatron.policy.packing import Microbatch
from etr_megatron.policy.stage_messages import StageMessages, process_groups


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro: Sequence[Microbatch],
    then: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run every microbatch forward, and backward unless `forward_only`, through every chunk of this rank's stage.

    `then(number, hidden)`, with the microbatch's number, runs on the last stage, which alone returns its results per microbatch
    (with a backward pass, the third item of each). A collective of the pipeline: every rank needs the same number of
    microbatches, a multiple of the number of stages if there are several chunks.
    """

    def forward(iterator: Iterator[tuple[int, Microbatch]], chunk: Any) -> tuple[Tensor, Any]:
        number, batch = next(iterator)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        hidden = chunk(batch.tokens, batch.positions, None, packed_seq_params=packed)
        return hidden, partial(then, number)

    interleaved = len(chunks) > 1
    config = get_model_config(chunks[0])
    messages = {}
    if config.pipeline_model_parallel_size > 1:
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        rows = [batch.tokens.shape[1] // parts for batch in micro]
        messages = dict(p2p_communicator=StageMessages(config, rows, len(chunks)), pg_collection=process_groups())
    found = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[enumerate(micro) for _ in chunks] if interleaved else enumerate(micro),
        model=list(chunks),
        num_microbatches=len(micro),
        seq_length=max(batch.tokens.shape[1] for batch in micro),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        **messages,
    )
    for chunk in chunks:
        forget_routing(chunk)
    return found
