"""An SGLang server as a process of the job: started and watched by it, and ended with it."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.arguments import require_interpreter
from etr_megatron.rollout.sglang.watchdog import files_of, remove

_WATCHDOG = Path(__file__).with_name("watchdog.py")
_GRACE_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True)
class ServerCommand:
    """How a server is started.

    python: interpreter of the environment that SGLang is installed in, which need not be the trainer's.
    launch: what it runs: arguments before the server's own, such as ("-m", "sglang.launch_server").
    arguments: SGLang's. environment: added to the job's own. host: the address it listens on.
    told_by: how it is told from another process that took its port. "weight_version": it takes `--weight-version` and reports
    it at /model_info. "request_id": it takes `--request-id-headers` and uses the value of that header as the id of a request.
    None: not at all. api_key: the one it requires. memory: fraction of its GPUs' memory for weights and KV cache, passed as one
    of what is free when it starts, see `share_of_free`; None if the arguments say it or SGLang chooses. shares_gpus: whether
    ranks use its GPUs, too. parts: number of nodes that the server spans. part: number of this process among theirs.
    """

    python: str
    launch: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    told_by: Literal["weight_version", "request_id"] | None = None
    api_key: str | None = field(default=None, repr=False)
    memory: float | None = None
    shares_gpus: bool = False
    parts: int = 1
    part: int = 0


_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")


def environment_of_server(inherited: Mapping[str, str], python: str) -> dict[str, str]:
    """A rank's environment without torchrun's variables: with TORCHELASTIC_USE_AGENT_STORE the server's own workers would look
    for each other in the job's store, forever. Proxies are bypassed, as servers only make requests to each other. Settings of
    torch's allocator are the ranks' alone: a server that can release memory does not start with expandable segments. Programs
    beside its interpreter come first, as in an activated environment: SGLang builds kernels with the `ninja` there."""
    left_out = (*_TORCHRUN, *_ALLOCATOR)
    kept = {k: v for k, v in inherited.items() if k not in left_out and not k.startswith(_TORCHRUN_PREFIXES)}
    path = os.pathsep.join([str(Path(python).absolute().parent), inherited.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "no_proxy": "*", "NO_PROXY": "*"}


_NEARLY_ALL, _MOST_OF_FREE = 0.9, 0.95
"""Free fraction above which only contexts of processes can take the rest; largest fraction of free memory for a server."""

_REMEMBERED = 1024
_HANDED_OUT: deque[int] = deque(maxlen=_REMEMBERED)
_PORTS = range(10_000, 30_000)
"""Ports for servers: above most services', below those that Kubernetes redirects."""
_TRIES = 10_000
"""Attempts to find a port: with half of the ports free, one is found in a few."""
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str) -> int:
    """A port that nothing listens on now, and that no process is given that asks for any port: a server binds it only when its
    model is loaded. The last ones that this process got are skipped, as their servers may not listen yet. Another process may
    still take the port: then `Host` restarts the server. Raises UserError when there is none, as at another machine's address.
    """
    ports = _ports_to_be_named()
    why = "every port that was tried is in use"
    for _ in range(_TRIES):
        with socket.socket() as probe:
            try:
                probe.bind((host, secrets.choice(ports)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                why = error.strerror or str(error)
                break
            port = int(probe.getsockname()[1])
            if port not in _HANDED_OUT:
                _HANDED_OUT.append(port)
                return port
    raise UserError(
        f"no port at {host} can be given to an SGLang server on {socket.gethostname()}: {why}; servers need free ports at an "
        "address of their own machine"
    )


def _ports_to_be_named() -> Sequence[int]:
    """Those of `_PORTS` that the kernel gives to nobody by itself; 0, any port, where that leaves too few."""
    try:
        first, last = map(int, _EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        return (0,)
    ports = [port for port in _PORTS if not first <= port <= last]
    return ports if len(ports) > 2 * _REMEMBERED else (0,)


def is_listened_to(address: str) -> bool:
    """Whether a process listens at an address of this machine, host:port."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def share_of_free(fraction: float, devices: str | None) -> float:
    """A fraction of a GPU's memory as one of what is free there now, by which SGLang counts `--mem-fraction-static`.

    When a colocated server is started again the ranks hold memory; with the fraction itself it would get less than the first
    time, or not enough for its weights. devices: as in CUDA_VISIBLE_DEVICES. Unchanged if nearly all is free or nvidia-smi does
    not tell.
    """
    command = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run([*command, *(("-i", devices) if devices else ())], capture_output=True, text=True, timeout=30.0)
        pairs = [tuple(map(float, line.split(","))) for line in told.stdout.splitlines()]
        least = min(free / total for free, total in pairs)
    except (OSError, ValueError, ZeroDivisionError, subprocess.SubprocessError):
        return fraction
    return fraction if least > _NEARLY_ALL else round(fraction / max(least, fraction / _MOST_OF_FREE), 3)


class ServerProcess:
    """One server and its watchdog. The server's output is appended to `log`.

    The server cannot outlive this process: see `watchdog`.
    """

    def __init__(self, name: str, command: ServerCommand, log: Path) -> None:
        """Start it; returns at once. Raises UserError when the interpreter does not exist, or no port is free."""
        require_interpreter(command.python)
        self.name, self.log, self.port = name, log, free_port(command.host)
        self._command = command
        # Unique to this start. Not the served model's name: the router tells models apart by that, and would not mix servers.
        self.identity = f"etr-{secrets.token_hex(8)}"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._report: int | None
        self._report, report = os.pipe()
        # SGLang prints its arguments, including the API key: only the user may read them.
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            self._log_begin = output.seek(0, os.SEEK_END)
            self._watchdog = subprocess.Popen(
                [sys.executable, str(_WATCHDOG), str(_GRACE_S), str(report), command.python, *self._arguments()],
                stdin=subprocess.PIPE,
                pass_fds=(report,),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment_of_server(os.environ, command.python), **command.environment},
                start_new_session=True,  # Ctrl-C is for the job, which then closes the pipe
            )
        os.close(report)

    def _arguments(self) -> Sequence[str]:
        options = {"weight_version": "--weight-version", "request_id": "--request-id-headers"}
        identity = () if self.told_by is None else (options[self.told_by], self.identity)
        address = ("--host", self._command.host, "--port", str(self.port))
        memory: tuple[str, ...] = ()
        if self._command.memory is not None:
            share = share_of_free(self._command.memory, self._command.environment.get("CUDA_VISIBLE_DEVICES"))
            memory = ("--mem-fraction-static", str(share))
        return (*self._command.launch, *self._command.arguments, *memory, *identity, *address)

    @property
    def told_by(self) -> str | None:
        """See `ServerCommand`."""
        return self._command.told_by

    @property
    def url(self) -> str:
        """Address of its HTTP interface."""
        return f"http://{self._command.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that its requests need."""
        return {} if self._command.api_key is None else {"Authorization": f"Bearer {self._command.api_key}"}

    @property
    def is_lost(self) -> bool:
        """Whether it has ended without `stop`."""
        return self._report is not None and not self.is_running

    @property
    def is_running(self) -> bool:
        """Whether the server's process has not ended."""
        return self._watchdog.poll() is None

    def said(self) -> str:
        """What this process has written to its log."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_begin)
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def last_words(self, lines: int = 15) -> str:
        """The end of that."""
        return "\n".join(self.said().splitlines()[-lines:])

    def stop(self) -> None:
        """Stop the server and wait until all its processes have ended; idempotent."""
        if self._report is None:
            return
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(2 * _GRACE_S)
        code = self._watchdog.poll()
        if code is None or code < 0:  # the watchdog hangs or was killed: end the group here
            self._kill_group()
            self._watchdog.kill()
            self._watchdog.wait()
        os.close(self._report)
        self._report = None

    def _kill_group(self) -> None:
        """As the watchdog does, but without a grace period. Returns after a while even if a process cannot be killed."""
        assert self._report is not None
        os.set_blocking(self._report, False)
        # ValueError: the watchdog was killed before it had a server. PermissionError: another user has the process id by now.
        with suppress(BlockingIOError, ProcessLookupError, PermissionError, ValueError):
            group = int(os.read(self._report, 32))
            deadline, files = time.monotonic() + _GRACE_S, files_of(group)
            try:
                os.killpg(group, signal.SIGKILL)
                while time.monotonic() < deadline:
                    os.killpg(group, 0)
                    time.sleep(_POLL_S)
            finally:
                remove(files)
