"""A reward function whose module has the servers of a run start warm (tests/warm_servers.py): in rank 0, which imports the
function to check it. `environment` is the run's, besides the session's own.
"""

from __future__ import annotations

import os
import sys

from tests.rewards import digit_sum_is_even

__all__ = ["digit_sum_is_even"]

REWARD = "reward.function=tests.warm_run:digit_sum_is_even"


def environment(python: str | None = None) -> dict[str, str]:
    """Variables with which a run's servers start warm. python: the interpreter of SGLang's environment, for real servers."""
    from tests.nursery import of_session
    from tests.warm_servers import IS_POSSIBLE, real_in_gangs

    if not IS_POSSIBLE:
        return {}
    return {"NURSERY": of_session().address, **({} if python is None else {"REAL_SERVERS": real_in_gangs(python)["real"]})}


_IS_RANK = os.environ.get("RANK") == "0" and "etr_megatron.observe" in sys.modules  # its graders lack that

if _IS_RANK and "NURSERY" in os.environ:
    from tests.warm_servers import start_warm

    start_warm(real=os.environ.get("REAL_SERVERS"))
