"""Low-rank adapters of a policy: the only weights that are trained, merged into the model's own after every update.

A model's parameter holds the merged value, base + scale * B A, rounded to the model's dtype. Servers receive this value, so
training and rollouts compute log-probs with the same weights. A backward pass computes the gradient of a merged matrix as if
the matrix were trained. A hook then projects this gradient onto A and B and frees it, so that only one matrix has a gradient at
a time. The code uses only a layer's weight, so it is the same for every spec, split and family. (Other implementations put
modules beside the layers and need no gradients of full matrices. But their servers also get merged weights, which differ by
rounding from the weights that are trained.)

A and B are fp32 and replicated on every tensor-parallel rank. The contributions of the ranks' shards to their gradients are
summed. (Some matrices of latent attention are replicated too. Each rank then has the gradient of its own tokens, because models
with experts need sequence parallelism.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from etr_megatron import platform
from etr_megatron.config import Config
from etr_megatron.policy.model import ADAPTERS, PolicyModel, own_parameters
from etr_megatron.policy.parallel import Layout
from etr_megatron.weights import Adapter, Architecture, LowRank, Shard, Weight, megatron_shard
from etr_megatron.weights.low_rank import Pair, add_gradients, add_products, bit_sum


@dataclass(frozen=True)
class _Adapted:
    """A parameter with adapters. base: its original value, on the CPU or the parameter's device. factors: adapter, A and B by
    the number of the HF tensor within the weight."""

    weight: Weight
    parameter: torch.nn.Parameter
    shard: Shard
    base: Tensor
    factors: dict[int, tuple[Adapter, Pair]]

    def merge(self) -> None:
        """Set the parameter to its base plus the adapters' products (in place)."""
        self.parameter.data.copy_(add_products(self.base.to(self.parameter.device), self.shard, self.factors))

    def restore(self) -> None:
        """Set the parameter to its base (in place)."""
        self.parameter.data.copy_(self.base)

    def project(self, parameter: Tensor) -> None:
        """Move the parameter's gradient to its adapters' `main_grad`, which DDP owns."""
        assert parameter.grad is not None
        into = {hf: (a.main_grad, b.main_grad) for hf, (_, (a, b)) in self.factors.items()}  # type: ignore[attr-defined]
        add_gradients(parameter.grad, self.shard, self.factors, into)
        parameter.grad = None


class Adapters(torch.nn.Module):
    """The adapters of a model chunk; registered as its submodule `ADAPTERS`. All other parameters of the chunk are frozen.

    own: the rank's weights and parameters. factors: A and B of each adapter, fp32, as the chunk's only trained parameters.
    """

    def __init__(
        self,
        chunk: PolicyModel,
        own: Iterable[tuple[Weight, Tensor]],
        spec: LowRank,
        layout: Layout,
        *,
        seed: int,
        offload_base: bool,
    ) -> None:
        super().__init__()
        chunk.requires_grad_(False)
        self.factors = torch.nn.ParameterList()
        self._layout = layout
        self._stored: list[tuple[str, bool]] = []  # name in a checkpoint, whether it is an expert's
        self._adapted: list[_Adapted] = []
        here = {id(parameter) for parameter in chunk.parameters()}
        for weight, parameter in own:
            if id(parameter) in here and (adapters := spec.adapters_of(weight)):
                factors = {one.hf: (one, self._create(weight, one, seed)) for one in adapters}
                base = parameter.detach().to("cpu", copy=True) if offload_base else parameter.detach().clone()
                if offload_base and platform.uses_cuda():
                    base = base.pin_memory()
                shard = megatron_shard(weight, chunk.arch, *layout.cut(weight))
                assert isinstance(parameter, torch.nn.Parameter)
                self._adapted.append(_Adapted(weight, parameter, shard, base, factors))
        chunk.add_module(ADAPTERS, self)
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_with_gradient)

    def _create(self, weight: Weight, adapter: Adapter, seed: int) -> Pair:
        """New parameters: A from PEFT's default distribution, with the same values in every layout, and B = 0."""
        digest = hashlib.sha256(f"{seed} {adapter.module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = adapter.columns**-0.5
        a = torch.empty(adapter.rank, adapter.columns).uniform_(-bound, bound, generator=generator)
        pair = tuple(
            torch.nn.Parameter(values.to(platform.device())) for values in (a, torch.zeros(adapter.rows, adapter.rank))
        )
        for stored, factor in zip(adapter.stored, pair, strict=True):
            self.factors.append(factor)
            self._stored.append((stored, weight.expert is not None))
            if weight.expert is not None:
                factor.allreduce = False  # type: ignore[attr-defined]  # Megatron's mark of experts
                # Megatron counts such a parameter in the gradient norm on every tensor-parallel rank where it is not `shared`.
                factor.tensor_model_parallel = True  # type: ignore[attr-defined]
                factor.shared = self._layout.etp_rank > 0  # type: ignore[attr-defined]
        return pair  # type: ignore[return-value]

    def named(self) -> dict[str, torch.nn.Parameter]:
        """A and B by their name in a checkpoint."""
        return {stored: factor for (stored, _), factor in zip(self._stored, self.factors, strict=True)}

    def watch(self) -> None:
        """Begin to move gradients to the adapters. Call it after DDP and the optimizer are built, since both take every
        parameter that requires a gradient."""
        for one in self._adapted:
            one.parameter.requires_grad_(True)
            one.parameter.register_post_accumulate_grad_hook(one.project)

    def base_sum(self) -> Tensor:
        """This rank's part of `PolicyAdapters.base_sum`, int64; a weight that several ranks hold counts on the first only."""
        layout = self._layout
        replica, expert_replica = mpu.get_data_parallel_rank(with_context_parallel=True), mpu.get_expert_data_parallel_rank()
        total = torch.zeros((), dtype=torch.int64)
        for one in self._adapted:
            repeated = layout.tp_rank if one.weight.split == "replicated" else 0
            if (replica if one.weight.expert is None else expert_replica) + repeated == 0:
                total += bit_sum(one.base)
        return total

    @torch.no_grad()
    def merge(self) -> None:
        """Set the adapted weights to their base plus the adapters' products (in place)."""
        for one in self._adapted:
            one.merge()

    @torch.no_grad()
    def restore(self) -> None:
        """Set the adapted weights to their base (in place)."""
        for one in self._adapted:
            one.restore()

    def sharded_state_dict(self, prefix: str = "", *_args: Any, **_kwargs: Any) -> dict[str, ShardedTensor]:
        """Megatron's checkpoint entries for A and B, which no layout splits."""
        layout, found = self._layout, {}
        for number, (stored, expert) in enumerate(self._stored):
            replicas = mpu.get_expert_data_parallel_rank() if expert else mpu.get_data_parallel_rank(with_context_parallel=True)
            name = f"{prefix}factors.{number}"
            replica = (0, layout.etp_rank if expert else layout.tp_rank, replicas)
            found[name] = ShardedTensor.from_rank_offsets(stored, self.factors[number], replica_id=replica)
        return found


def _with_gradient(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    """Make the embedding's output require a gradient: a recomputed layer has no backward pass if none of its inputs does."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


class PolicyAdapters:
    """The adapters of all of a rank's chunks; none if all weights are trained."""

    def __init__(self, arch: Architecture, chunks: Sequence[PolicyModel], layout: Layout, config: Config) -> None:
        self.spec = LowRank.of(config.lora)
        self._of_chunks: list[Adapters] = []
        self._base_sum = None if self.spec is not None else 0
        if self.spec is not None:
            self.spec.refuse_untrained(arch, layout.training)
            seed, offload = config.run.seed, config.lora.offload_base
            own = own_parameters(chunks).values()
            self._of_chunks = [Adapters(one, own, self.spec, layout, seed=seed, offload_base=offload) for one in chunks]

    def __bool__(self) -> bool:
        return self.spec is not None

    def named(self) -> dict[str, torch.nn.Parameter]:
        """This rank's A and B by their name in a checkpoint."""
        return {name: factor for one in self._of_chunks for name, factor in one.named().items()}

    def watch(self) -> None:
        """See `Adapters.watch`."""
        for one in self._of_chunks:
            one.watch()

    def merge(self) -> None:
        """See `Adapters.merge`."""
        for one in self._of_chunks:
            one.merge()

    def base_sum(self) -> int:
        """A fingerprint of the base weights, the same in every layout: the sum, modulo 2**64, of the bits of all elements of
        adapted matrices, as integers; 0 without adapters. A collective."""
        if self._base_sum is None:  # cached, as it takes seconds and every checkpoint needs it
            total = sum((one.base_sum() for one in self._of_chunks), torch.zeros((), dtype=torch.int64)).to(platform.device())
            dist.all_reduce(total)
            self._base_sum = int(total)
        return self._base_sum

    def sharded_state_dicts(self) -> list[dict[str, ShardedTensor]]:
        """For every chunk, Megatron's entries of the checkpoint tensors that its `load_state_dict` takes."""
        return [one.sharded_state_dict(f"{ADAPTERS}.") for one in self._of_chunks]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which all weights have their values from the start of training."""
        for one in self._of_chunks:
            one.restore()
        try:
            yield
        finally:
            self.merge()

    def sum_gradients(self, ddp: Sequence[Any]) -> None:
        """Sum the gradients in DDP's buffers over tensor-parallel ranks (in place), before DDP reduces them over replicas. A
        collective."""
        if not self:
            return
        group, expert_group = mpu.get_tensor_model_parallel_group(), mpu.get_expert_tensor_parallel_group()
        for chunk in ddp:
            for buffer in chunk.buffers:
                dist.all_reduce(buffer.grad_data, group=group)
            for buffer in chunk.expert_parallel_buffers:
                dist.all_reduce(buffer.grad_data, group=expert_group)
