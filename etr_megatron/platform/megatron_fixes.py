"""Defects of megatron-core 0.16.1 that show without Transformer Engine and apex, where Adam is torch's.

Each entry names the defect, where it is and how it would be noticed. On a machine with TE or apex `apply()` does nothing: the
code paths below are not taken there.
"""

from __future__ import annotations

from typing import Any

import torch


def apply() -> None:
    """Mend the defects in this process; call after the CPU shim is installed and before models are built."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    _mend_distributed_optimizer(distrib_optimizer.DistributedOptimizer)
    _mend_selective_recompute()


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
