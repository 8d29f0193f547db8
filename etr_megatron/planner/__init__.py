"""Plan memory and time of a config on a number of GPUs. Plain Python and NumPy; needs no GPU and no weights.

    plan = make_plan(load_config("configs/qwen3_32b_32gpu.yaml"), gpus=32)
    print(plan.fits, plan.tightest.rank, plan.time.step)

Importing it does not import torch. `dry_run` also builds a rank's model on the meta device, and imports everything.
"""

from etr_megatron.planner.advice import Suggestion, suggestions
from etr_megatron.planner.hardware import GPUS, H100, Hardware
from etr_megatron.planner.plan import Plan, make_plan
from etr_megatron.planner.report import render

__all__ = ["GPUS", "H100", "Hardware", "Plan", "Suggestion", "make_plan", "render", "suggestions"]
