"""What NCCL and torch's groups on it read from the environment where training ranks and servers share groups.

A server may die, which the job survives. By default it would not: the watchdog of a torch group ends its process a minute after
an operation has failed, even if the failure was caught and the group aborted; and it signals the monitor of the process's first
NCCL group to write its flight record, after which that one ends the process, too. (torch 2.11, ProcessGroupNCCL.cpp:
`Watchdog::runLoop`, `WorkNCCL::handleException` and `HeartbeatMonitor::runLoop`.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SHARED = {
    # As SGLang sets it for its workers: processes of one machine that differ in it cannot connect. It holds for training's
    # groups as well, which then do without what NCCL builds on it, such as NVLS.
    "NCCL_CUMEM_ENABLE": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # the first group of the process does not heed signals to write its record
}
_SURVIVING = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # the watchdog reports an error and goes on
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",  # it then sleeps four times as long; closing a group waits for it
}

_lock = threading.Lock()


def prepare_for_groups_with_servers() -> None:
    """Set what this process and the servers that it starts need before their first NCCL group, unless the user has set it."""
    for name, value in _SHARED.items():
        os.environ.setdefault(name, value)


@contextmanager
def outliving_failures() -> Iterator[None]:
    """NCCL groups that are formed in this context do not end the process when an operation on them fails.

    Whoever waits for the operation gets the error, and has to close the group. Groups read the environment as they are formed;
    those of training keep torch's default, which ends a rank whose collective hangs.
    """
    with _lock:  # else a thread that leaves could restore what another one has set
        before = {name: os.environ.get(name) for name in _SURVIVING}
        os.environ.update(_SURVIVING)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
