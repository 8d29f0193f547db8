"""Environment variables of NCCL and of torch's NCCL groups, for process groups that training ranks and servers share.

The job must survive the death of a server. With torch's defaults it does not: when an operation has failed, two threads end the
process, even if the error was caught and the group aborted. The group's watchdog does so after a minute. It also signals the
monitor of the process's first NCCL group to write its flight record, and that monitor then ends the process too. (torch 2.11,
ProcessGroupNCCL.cpp: `Watchdog::runLoop`, `WorkNCCL::handleException` and `HeartbeatMonitor::runLoop`.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SHARED = {
    # SGLang sets this for its workers. Processes of one machine must agree on it to connect. It also applies to the groups of
    # training, which then cannot use NCCL's features that build on it, such as NVLS.
    "NCCL_CUMEM_ENABLE": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # the monitor of the first group ignores signals to write its record
}
_SURVIVING = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # the watchdog reports an error and goes on
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",  # it then sleeps four times as long; closing a group waits for it
}

_lock = threading.Lock()


def prepare_for_groups_with_servers() -> None:
    """Set the variables that this process and the servers it starts need before their first NCCL group. Keeps variables that
    the user has set."""
    for name, value in _SHARED.items():
        os.environ.setdefault(name, value)


@contextmanager
def outliving_failures() -> Iterator[None]:
    """NCCL groups that are formed in this context do not end the process when an operation on them fails.

    The code that waits for the operation gets the error, and has to close the group. A group reads the environment when it is
    formed. The groups of training keep torch's default, which ends a rank whose collective hangs.
    """
    with _lock:  # otherwise a thread that leaves could reset the variables that another thread has set
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
