"""The policy on megatron.core: layout, model, packing, forward and backward passes, optimizer.

Importing this package prepares megatron.core for the platform first.
"""

import logging

from etr_megatron import platform

platform.prepare_megatron()
# It warns at creation; bad results raise exceptions anyway.
logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
# At a pipeline stage without experts, it warns of their optimizer's state, which is not there.
logging.getLogger("megatron.core.dist_checkpointing.optimizer").setLevel(logging.ERROR)

from etr_megatron.policy.batch import PolicyBatch  # noqa: E402
from etr_megatron.policy.parallel import Layout, configured_layout, init_layout, init_world  # noqa: E402
from etr_megatron.policy.policy import Policy, TokenLogprobs, Update  # noqa: E402
from etr_megatron.policy.routing import StepRouting  # noqa: E402

__all__ = [
    "Layout",
    "Policy",
    "PolicyBatch",
    "StepRouting",
    "TokenLogprobs",
    "Update",
    "configured_layout",
    "init_layout",
    "init_world",
]
