"""A toy model under Megatron's interleaved schedule, with the single-pass loss on its last chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

import etr_megatron.policy.parallel  # noqa: F401  (its import makes megatron.core importable without a GPU)
from etr_megatron.vocab_parallel import VocabShard, vocab_parallel_loss
from tests.vocab_cases import Case, loss_case

LAYERS, SEQUENCE, HIDDEN, VOCAB = 4, 5, 12, 31
MICROBATCHES, REPLICAS = 4, 2
"""Per data-parallel replica; each has its own microbatches."""


def microbatch(number: int) -> Case:
    """`hidden` [SEQUENCE, HIDDEN] are the embeddings that the first layer gets; `weight` is not used."""
    case = loss_case(SEQUENCE, HIDDEN, VOCAB, seed=10 + number)
    return replace(case, old_logp=torch.linspace(-4.0, -3.0, SEQUENCE))  # near the small head's


def parameters() -> dict[str, torch.Tensor]:
    """Layers [HIDDEN, HIDDEN] and the head [VOCAB, HIDDEN]."""
    generator = torch.Generator().manual_seed(3)
    layers = {f"layer{n}": 0.5 * torch.randn(HIDDEN, HIDDEN, generator=generator) for n in range(LAYERS)}
    return {**layers, "head": 0.1 * torch.randn(VOCAB, HIDDEN, generator=generator)}


def toy_config() -> Any:
    """Megatron's TransformerConfig of two stages with two chunks each."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        # With two stages, each is the other's predecessor and successor: one batch would mix up their messages.
        batch_p2p_comm=False,
        overlap_p2p_comm=True,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
    )


def chunk_class(config: Any) -> type[torch.nn.Module]:
    """One layer of the toy model; the last chunk also has the head. config: Megatron's TransformerConfig."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import MegatronModule

    class Chunk(MegatronModule):
        def __init__(self, number: int) -> None:
            super().__init__(config)
            self.number, self.model_type = number, ModelType.encoder_or_decoder
            self.layer = torch.nn.Parameter(parameters()[f"layer{number}"])
            if number == LAYERS - 1:
                self.head = torch.nn.Parameter(parameters()["head"])

        def set_input_tensor(self, tensors: list[torch.Tensor]) -> None:
            self._received = tensors[0] if isinstance(tensors, list) else tensors

        def forward(self, case: Case) -> torch.Tensor:
            states = case.hidden[:, None] if self.number == 0 else self._received
            return torch.tanh(states @ self.layer)

    return Chunk


def interleaved() -> dict[str, torch.Tensor]:
    """This rank's gradients by parameter in the second of two steps, on two stages with two chunks each and two replicas.

    Replica r trains on the microbatches r * MICROBATCHES to (r + 1) * MICROBATCHES - 1; the reduction is overlapped.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from etr_megatron.policy.parallel import _destroy_layout

    _destroy_layout()
    mpu.initialize_model_parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    stage, replica = mpu.get_pipeline_model_parallel_rank(), mpu.get_data_parallel_rank()
    assert dist.get_world_size() == 2 * REPLICAS == 2 * mpu.get_data_parallel_world_size()
    config = toy_config()
    chunk_of = chunk_class(config)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    chunks = [
        DistributedDataParallel(config, ddp_config, chunk_of(2 * part + stage), disable_bucketing=part > 0) for part in range(2)
    ]
    config.no_sync_func = [chunk.no_sync for chunk in chunks]
    config.finalize_model_grads_func = lambda model, *_args, **_options: [chunk.finish_grad_sync() for chunk in model]

    def forward(iterator, chunk):
        case = next(iterator)

        def loss(states: torch.Tensor):
            head = chunk.module.head
            total, _, _ = vocab_parallel_loss(
                states[:, 0], head, case.targets, case.token_loss, shard=VocabShard(VOCAB, VOCAB), chunk_rows=2
            )
            return total, torch.tensor(SEQUENCE, dtype=torch.int), {}

        return chunk(case), loss

    numbers = range(replica * MICROBATCHES, (replica + 1) * MICROBATCHES)
    for _ in range(2):  # Megatron overlaps nothing in the first, in which it learns when a bucket is complete
        for chunk in chunks:
            chunk.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([microbatch(n) for n in numbers]) for _ in chunks],
            model=chunks,
            num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
    found = {f"layer{chunk.module.number}": chunk.module.layer.main_grad.clone() for chunk in chunks}
    if hasattr(chunks[-1].module, "head"):
        found["head"] = chunks[-1].module.head.main_grad.clone()
    _destroy_layout()
    return found
