"""Fixes for bugs in megatron-core 0.16.1. Most of them only appear without Transformer Engine and apex, with torch's Adam.

The docstring of each fix names the bug, its file and its symptom. With TE or apex, the fixes for code paths that are then not
taken are not applied.
"""

# The fixes replace attributes of Megatron's own classes and modules, and mark them as fixed.
# mypy: disable-error-code="assignment,attr-defined,method-assign"

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def apply() -> None:
    """Apply the fixes in this process; call after the CPU shim is installed and before models are built."""
    from megatron.core.optimizer import HybridDeviceOptimizer, distrib_optimizer

    _mend_offloaded_optimizer(HybridDeviceOptimizer)
    _mend_step_of_optimizers_without_parameters()
    _mend_bf16_optimizers_without_parameters()
    _mend_latent_attention()
    _mend_gradient_accumulation_fusion()
    _mend_rotary_embedding_of_packed_sequences()
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    _mend_distributed_optimizer(distrib_optimizer.DistributedOptimizer)
    _mend_selective_recompute()
    _mend_experts()
    _mend_uneven_collectives()


def _mend_offloaded_optimizer(cls: Any) -> None:
    """`cpu_offloading/hybrid_optimizer.py` stores the classes of its two Adams in the parameter groups, and so in checkpoints.

    `torch.load` with weights_only does not read classes (`WeightsUnpickler error: Unsupported global`), so no run could be
    resumed. The fix leaves them out of the state: the loading optimizer sets its own classes.
    """
    if hasattr(cls, "_etr_original_state_dict"):
        return
    cls._etr_original_state_dict = cls.state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        found = self._etr_original_state_dict()
        groups = [
            {key: value for key, value in group.items() if not isinstance(value, type)} for group in found["param_groups"]
        ]
        return {**found, "param_groups": groups}

    cls.state_dict = state_dict


def _mend_latent_attention() -> None:
    """Without TE, `transformer/multi_latent_attention.py` imports stand-ins for TE's classes and still sets HAVE_TE. So no
    layer can be built (`TypeError: isinstance() arg 2 must be a type`)."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


def _mend_gradient_accumulation_fusion() -> None:
    """`tensor_parallel/layers.py` refuses `gradient_accumulation_fusion` without apex, though TE's layers fuse without it.

    `ColumnParallelLinear` checks in its constructor for a kernel that its backward pass would call (RuntimeError). With TE's
    layers it is only the class of the GPT model's output layer, which never runs: the head uses that layer's weight alone.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import layers

    if transformer_engine.HAVE_TE:
        layers._grad_accum_fusion_available = True


def _mend_rotary_embedding_of_packed_sequences() -> None:
    """`models/common/embeddings/rope_utils.py` waits for the device twice per call, for lengths of sequences.

    Latent attention calls it for queries and for keys in every layer and pass (TE's fused rotary embedding is off for it), and
    the host cannot launch kernels ahead meanwhile. The fix looks up each token's frequencies by its position, which is computed
    on the device.
    """
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_thd = rotary_embedding_of_packed_sequences


def rotary_embedding_of_packed_sequences(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> Tensor:
    """Megatron's `_apply_rotary_pos_emb_thd` without waiting for the device.

    t: [T, heads, dimensions], this context-parallel rank's tokens of packed sequences. cu_seqlens: int32 [sequences + 1],
    offsets over the tokens of all CP ranks. freqs: [at least the longest sequence, 1, 1, turned dimensions].
    """
    from megatron.core.models.common.embeddings import rope_utils

    cp, rank, tokens = cp_group.size(), cp_group.rank(), len(t)
    offsets = cu_seqlens.long() // cp
    lengths = offsets.diff()
    sequence = torch.arange(len(lengths), device=t.device).repeat_interleave(lengths, output_size=tokens)
    positions = torch.arange(tokens, device=t.device) - offsets[sequence]
    if cp > 1:  # of the 2 CP chunks of a sequence, a rank has one from each end
        chunk = lengths[sequence] // 2
        positions = positions + chunk * torch.where(positions < chunk, rank, 2 * (cp - 1) - rank)
    return rope_utils._apply_rotary_pos_emb_bshd(
        t.unsqueeze(1),
        freqs[positions],
        rotary_interleaved=rotary_interleaved,
        multi_latent_attention=multi_latent_attention,
        mscale=mscale,
    ).squeeze(1)


def _mend_distributed_optimizer(cls: Any) -> None:
    """On load, `distrib_optimizer.py` expects TE's FusedAdam, whose states have no `step`.

    - `_set_main_param_and_optimizer_states` copies into leaf views without no_grad and looks for a saved `step` (KeyError).
    - `state_dict` reads the step from the states of an optimizer even if it has no parameters (see below).
    - `load_state_dict` gives every state the SAME `step` tensor, so Adam increments it once per parameter. This is silent: the
      first step after a resume is right, the second drifts (loss 4.851482 instead of 4.851872 in a four-layer model).
    """
    if hasattr(cls, "_etr_original_load_state_dict"):
        return
    cls._etr_original_load_state_dict, cls._etr_step = cls.load_state_dict, 0
    state_dict_with_parameters = cls.state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        if self.optimizer.state:
            return state_dict_with_parameters(self)
        groups = self.optimizer.state_dict()["param_groups"]
        kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        found: dict[str, Any] = {"optimizer": {"param_groups": [{**group, "step": self._etr_step} for group in kept]}}
        if self.grad_scaler:
            found["grad_scaler"] = self.grad_scaler.state_dict()
        return found

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            main.copy_(tensors["param"])
            for key in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[main][key].copy_(tensors[key])

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        self._etr_original_load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    cls.state_dict = state_dict
    cls._set_main_param_and_optimizer_states = set_states
    cls.load_state_dict = load_state_dict


def _mend_step_of_optimizers_without_parameters() -> None:
    """A checkpoint takes Adam's step from rank 0's optimizers, but an optimizer without parameters there has no step.

    Experts have a separate optimizer, which has no parameters on a pipeline stage without experts. If rank 0 is on such a
    stage, the experts' step is silently lost: after a resume, Adam's bias correction restarts at the first step. (Without TE
    the distributed optimizer's `state_dict` fails: `assert len(steps) == 1`.) The fix takes the step of the rank's other
    optimizer.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    if hasattr(ChainedOptimizer, "_etr_original_sharded_state_dict"):
        return
    ChainedOptimizer._etr_original_sharded_state_dict = ChainedOptimizer.sharded_state_dict

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        chain = self.chained_optimizers
        in_states = _step_in(place for one in chain for place in one.optimizer.state.values())
        step = _step_in(group for one in chain for group in one.optimizer.param_groups) if in_states is None else in_states
        for one in chain:
            one._etr_step = step or 0
        found = self._etr_original_sharded_state_dict(*args, **kwargs)
        if len(chain) > 1 and step is not None:
            for part in found.values():
                _complete_step(part.get("optimizer", part), step, in_states is None)
        return found

    ChainedOptimizer.sharded_state_dict = sharded_state_dict


def _step_in(places: Iterable[dict[str, Any]]) -> int | None:
    """Adam's step, which all parameters share. Torch stores it with each parameter's moments, TE and apex in the groups."""
    return next((int(place["step"]) for place in places if "step" in place), None)


def _complete_step(state: dict[str, Any], step: int, in_groups: bool) -> None:
    """Set the step, in place, where one optimizer of a chain reads it; the distributed optimizer always reads the groups."""
    if in_groups or "state" not in state:
        for group in state["param_groups"]:
            group.setdefault("step", step)
    else:
        state["state"].setdefault("common_step", torch.tensor(float(step)))


def _mend_bf16_optimizers_without_parameters() -> None:
    """`optimizer.py` stores an empty list of fp32 weights for the whole model if rank 0's optimizer has no parameters.

    No rank can then load its weights: `Cannot merge two lists with different lengths`. When this happens is said at
    `_mend_step_of_optimizers_without_parameters`.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as cls

    if hasattr(cls, "_etr_original_sharded_state_dict"):
        return
    cls._etr_original_sharded_state_dict = cls.sharded_state_dict
    original_load_state_dict, key = cls.load_state_dict, "fp32_from_fp16_params"

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = self._etr_original_sharded_state_dict(*args, **kwargs)
        if not any(found[key]):
            del found[key]
        return found

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original_load_state_dict(self, {key: [[] for _ in self.fp32_from_float16_groups], **state_dict})

    cls.sharded_state_dict, cls.load_state_dict = sharded_state_dict, load_state_dict


def _mend_selective_recompute() -> None:
    """`CheckpointWithoutOutput(fp8=False)` takes the FP8 branch (`self.fp8 = fp8 is not None`): NameError without TE."""
    from megatron.core.tensor_parallel import random

    cls = random.CheckpointWithoutOutput
    if getattr(cls, "_etr_mended", False):
        return
    original = cls.__init__

    def __init__(self: Any, fp8: Any = False) -> None:
        original(self, fp8 or None)

    cls.__init__ = __init__
    cls._etr_mended = True


def _mend_experts() -> None:
    """Bugs in `moe/moe_utils.py` on a machine without TE or CUDA.

    - Without TE `te_general_gemm` is not defined, but the router tests whether it is None: NameError in the first forward pass.
    - `maybe_move_tensor_to_cpu(as_numpy=True)` returns a CPU tensor unchanged, but all_to_all_single takes no tensor for split
      sizes: TypeError in the token dispatcher.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    original = moe_utils.maybe_move_tensor_to_cpu
    if getattr(original, "_etr_mended", False):
        return

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    maybe_move_tensor_to_cpu._etr_mended = True
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _mend_uneven_collectives() -> None:
    """`tensor_parallel/mappings.py` gathers and reduce-scatters unequal parts (tokens of experts with ETP and EP above 1).

    NCCL supports that; gloo does not ("ProcessGroupGloo::allgather: invalid tensor size"), but its all-to-all does.
    """
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    if getattr(gather, "_etr_mended", False):
        return

    def gather_along_first_dim(
        input_: Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        ranks = group.size()
        if output_split_sizes is None or ranks == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        sent = torch.cat([input_] * ranks)
        dist.all_to_all_single(output, sent, list(output_split_sizes), [len(input_)] * ranks, group=group)
        return output

    def reduce_scatter_along_first_dim(
        input_: Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        ranks = group.size()
        if input_split_sizes is None or ranks == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        mine = input_split_sizes[group.rank()]
        parts = input_.new_empty(ranks * mine, *input_.shape[1:])
        dist.all_to_all_single(parts, input_.contiguous(), [mine] * ranks, list(input_split_sizes), group=group)
        return parts.view(ranks, mine, *input_.shape[1:]).sum(0)

    gather_along_first_dim._etr_mended = True
    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim
