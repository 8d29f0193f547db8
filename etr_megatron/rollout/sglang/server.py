"""An SGLang server as a process of the job, which starts it, watches it and ends it."""

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

_LAST_WORDS = 1 << 16
"""Bytes at the end of a log that are read for its last lines: the log of a long run may have gigabytes."""


@dataclass(frozen=True)
class ServerCommand:
    """How a server is started.

    python: interpreter of the environment that SGLang is installed in, which need not be the trainer's.
    launch: arguments of the interpreter before those of the server, such as ("-m", "sglang.launch_server").
    arguments: SGLang's. environment: added to that of the job. host: the address it listens on. api_key: the key it requires.
    told_by: how to distinguish the server from another process that took its port. "weight_version": it takes
    `--weight-version` and reports it at /model_info. "request_id": it takes `--request-id-headers`, the name of a header whose
    value it uses as a request's id. None: not at all.
    memory: fraction of its GPUs' memory for weights and KV cache. It is passed to SGLang as a fraction of the memory that is
    free at the start, see `share_of_free`. None if it is in the arguments or SGLang chooses it.
    shares_gpus: whether ranks use its GPUs too. parts: number of nodes that the server spans. part: this node's number.
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
    """Environment variables of a server, from those of a rank:

    - Without torchrun's: with TORCHELASTIC_USE_AGENT_STORE the server's workers would look for each other in the job's store.
    - Without those of torch's allocator: with expandable segments, a server that can release memory does not start.
    - Proxies are bypassed, because servers send requests only to each other.
    - The directory of `python` is first in PATH, as in an activated environment: SGLang builds kernels with the `ninja` there.
    """
    left_out = (*_TORCHRUN, *_ALLOCATOR)
    kept = {k: v for k, v in inherited.items() if k not in left_out and not k.startswith(_TORCHRUN_PREFIXES)}
    path = os.pathsep.join([str(Path(python).absolute().parent), inherited.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "no_proxy": "*", "NO_PROXY": "*"}


_NEARLY_ALL, _MAX_OF_FREE = 0.9, 0.95
"""Free fraction of a GPU's memory above which only CUDA contexts can be using the rest; largest fraction of free memory for a
server."""

_REMEMBERED = 1024
_HANDED_OUT: deque[int] = deque(maxlen=_REMEMBERED)
_PORTS = range(10_000, 30_000)
"""Ports for servers: above those of most services, and below those that Kubernetes redirects."""
_TRIES = 10_000
"""Attempts to find a free port. A few are enough if half of the ports are free."""
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str) -> int:
    """A port on which nothing listens. Raises UserError when there is none, as for the address of another machine.

    A server binds its port only when its model is loaded. So ports are left out that the kernel gives to processes that ask for
    any port, and the last ones that this function returned. If another process still takes the port, `Host` restarts the
    server.
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
    """The ports of `_PORTS` outside the kernel's ephemeral range; 0 (any port) if these are too few."""
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
    """Convert a fraction of a GPU's memory to one of the memory that is free there now, as `--mem-fraction-static` needs.

    When a colocated server is restarted, ranks hold memory. With the unconverted fraction the server would get less than at its
    first start, perhaps too little for its weights. devices: as in CUDA_VISIBLE_DEVICES. Returns `fraction` itself if nearly
    all memory is free, or nvidia-smi does not report it.
    """
    command = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run([*command, *(("-i", devices) if devices else ())], capture_output=True, text=True, timeout=30.0)
        pairs = [tuple(map(float, line.split(","))) for line in told.stdout.splitlines()]
        least = min(free / total for free, total in pairs)
    except (OSError, ValueError, ZeroDivisionError, subprocess.SubprocessError):
        return fraction
    return fraction if least > _NEARLY_ALL else round(fraction / max(least, fraction / _MAX_OF_FREE), 3)


class ServerProcess:
    """One server and its watchdog. The server's output is appended to `log`.

    The server cannot outlive this process: see `watchdog`.
    """

    def __init__(self, name: str, command: ServerCommand, log: Path) -> None:
        """Start it, and return at once. Raises UserError when the interpreter does not exist, or no port is free."""
        require_interpreter(command.python)
        self.name, self.log, self.port = name, log, free_port(command.host)
        self._command = command
        # Unique to this start. It is not passed as the served model's name, because the router keeps servers of models with
        # different names apart.
        self.identity = f"etr-{secrets.token_hex(8)}"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._report: int | None
        self._report, report = os.pipe()
        # Only the user may read the log, because SGLang prints its arguments, including the API key.
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            self._log_begin = output.seek(0, os.SEEK_END)
            self._watchdog = subprocess.Popen(
                [sys.executable, str(_WATCHDOG), str(_GRACE_S), str(report), command.python, *self._arguments()],
                stdin=subprocess.PIPE,
                pass_fds=(report,),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment_of_server(os.environ, command.python), **command.environment},
                start_new_session=True,  # Ctrl-C goes to the job, which then closes the pipe
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

    def said(self, most: int | None = None) -> str:
        """The log output of this process; most: only the last bytes, up to this number."""
        try:
            with self.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(self._log_begin if most is None else max(self._log_begin, end - most))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    @property
    def missed_a_port(self) -> bool:
        """Whether it said that another process had taken its port or, with data-parallel attention, one of those beside it that
        SGLang also uses (`PortArgs` of server_args.py)."""
        said = self.said().lower()
        return "address already in use" in said or "port is already in use" in said

    def last_words(self, lines: int = 15) -> str:
        """The last lines of the log output of this process."""
        return "\n".join(self.said(_LAST_WORDS).splitlines()[-lines:])

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
        """Kill the server's process group, as the watchdog does, but without a grace period. Returns after `_GRACE_S` seconds
        even if a process is left."""
        assert self._report is not None
        os.set_blocking(self._report, False)
        # ValueError: the watchdog was killed before it started a server. PermissionError: another user has the process id now.
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
