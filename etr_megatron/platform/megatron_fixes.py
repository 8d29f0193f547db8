"""Defects of megatron-core 0.16.1, most of which show without Transformer Engine and apex only, where Adam is torch's.

Each entry names the defect, where it is and how it would be noticed. With TE or apex the code paths of those are not taken, and
they are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def apply() -> None:
    """Mend the defects in this process; call after the CPU shim is installed and before models are built."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    _mend_distributed_optimizer(distrib_optimizer.DistributedOptimizer)
    _mend_optimizers_without_parameters(distrib_optimizer.DistributedOptimizer)
    _mend_selective_recompute()
    _mend_experts()
    _mend_uneven_collectives()


def _mend_distributed_optimizer(cls: Any) -> None:
    """`distrib_optimizer.py` expects TE's FusedAdam, whose states have no `step`, on load.

    - `_set_main_param_and_optimizer_states` copies into leaf views without no_grad and looks for a saved `step` (KeyError).
    - `load_state_dict` gives every state the SAME `step` tensor, so Adam counts it up once per parameter. Silent: the first
      step after a resume is right, the second drifts (4.851482 instead of 4.851872 in the loss of a four-layer model).
    """
    if hasattr(cls, "_etr_original_load_state_dict"):
        return
    cls._etr_original_load_state_dict = cls.load_state_dict

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

    cls._set_main_param_and_optimizer_states = set_states
    cls.load_state_dict = load_state_dict


def _mend_optimizers_without_parameters(cls: Any) -> None:
    """A checkpoint takes Adam's step from the states of rank 0's parameters, and an optimizer may have none there.

    Experts have an optimizer of their own, without parameters on a pipeline stage without experts. The distributed one's
    `state_dict` then fails (`assert len(steps) == 1`), the others leave `common_step` out and the step is lost. It is that of
    the rank's other optimizer.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    if hasattr(cls, "_etr_step"):
        return
    cls._etr_step = 0.0
    state_dict_with_parameters, sharded_state_dict_of_chain = cls.state_dict, ChainedOptimizer.sharded_state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        if self.optimizer.state:
            return state_dict_with_parameters(self)
        groups = self.optimizer.state_dict()["param_groups"]
        kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        found: dict[str, Any] = {"optimizer": {"param_groups": [{**group, "step": self._etr_step} for group in kept]}}
        if self.grad_scaler:
            found["grad_scaler"] = self.grad_scaler.state_dict()
        return found

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        for one in self.chained_optimizers:
            one._etr_step = _step_of(self.chained_optimizers)
        found = sharded_state_dict_of_chain(self, *args, **kwargs)
        if len(self.chained_optimizers) > 1:
            states = [one.get("optimizer", one).get("state") for one in found.values()]
            steps = [state["common_step"] for state in states if state and "common_step" in state]
            for state in states if steps else ():
                if state is not None:
                    state.setdefault("common_step", steps[0])
        return found

    cls.state_dict = state_dict
    ChainedOptimizer.sharded_state_dict = sharded_state_dict


def _step_of(optimizers: Any) -> float:
    """Adam's step, the same for all parameters that a rank has; 0 before the first."""
    states = [state for one in optimizers for state in one.optimizer.state.values()]
    return float(states[0]["step"]) if states and "step" in states[0] else 0.0


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
    """`moe/moe_utils.py` on a machine without TE, and without CUDA.

    - Without TE `te_general_gemm` is not defined, and the router asks whether it is None: NameError in the first forward.
    - `maybe_move_tensor_to_cpu(as_numpy=True)` hands a tensor that lies on CPU back as it is; all_to_all_single takes no tensor
      for split sizes: TypeError in the token dispatcher.
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

    NCCL does that; gloo refuses: "ProcessGroupGloo::allgather: invalid tensor size". Its all-to-all takes unequal parts.
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
