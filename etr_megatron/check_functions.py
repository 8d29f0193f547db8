"""Check in one process, before any rank is started, that the user's functions can be imported and called.

Every check raises UserError, which names the key, its value and the fix.
"""

from __future__ import annotations

from etr_megatron.config import LOSSES, Config, fill_objective, resolved
from etr_megatron.errors import UserError
from etr_megatron.imports import ImportPathError
from etr_megatron.platform.files import refuse_all


def check_functions(config: Config) -> None:
    """Check all functions; raises one `UserError` with every problem found."""
    refuse_all(lambda: check_reward(config), lambda: check_environment(config), lambda: check_loss(config))


def check_reward(config: Config) -> None:
    """Check that a custom reward function can be imported."""
    if config.reward.function == "math":
        return
    from etr_megatron.reward import load_grader

    try:
        load_grader(config.reward)
    except ImportPathError as error:
        raise UserError(f"reward.function is {config.reward.function!r}: {error}") from error


def check_environment(config: Config) -> None:
    """Check that the environment's function can be imported; a replay does not call it."""
    if config.environment.function is None or config.rollout.replay is not None:
        return
    from etr_megatron.environment import load_environment

    try:
        load_environment(config.environment)
    except ImportPathError as error:
        raise UserError(f"environment.function is {config.environment.function!r}: {error}") from error


def check_loss(config: Config) -> None:
    """Check that a custom loss can be imported and called."""
    name = resolved(fill_objective(config.objective).loss)
    if name in LOSSES:
        return
    from etr_megatron.objective import resolve_loss

    resolve_loss(name)
