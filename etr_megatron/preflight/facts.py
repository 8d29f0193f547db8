"""Facts about a node, collected by its first rank; nothing here communicates with other nodes."""

from __future__ import annotations

import hashlib
import os
import platform as python_platform
import resource
import shutil
import socket
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from etr_megatron.config import Config, sources_of
from etr_megatron.errors import UserError
from etr_megatron.platform.files import path_errors, problems_of
from etr_megatron.platform.world import server_node_index

PACKAGES = (
    "etr-megatron",
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "apex",
    "flash-attn",
    "sglang",
    "triton",
    "safetensors",
    "math-verify",
)

_MODEL_FILES = ("*.json", "*.safetensors", "*.distcp", ".metadata", "*.txt", "*.model", "*.jinja")
"""Config, weights in either format, tokenizer and chat template."""

_SAMPLES, _SAMPLE_BYTES = 8, 64 * 1024


@dataclass(frozen=True)
class NodeFacts:
    """One node. Sizes in bytes.

    number: torchrun's GROUP_RANK. clock: the node's time() right after all ranks met. versions: package -> version, "-" if not
    installed. devices: name of each GPU, empty on CPU. run_dir_free, shm_free: free space for `run.dir` and in /dev/shm.
    memory_free: memory that new processes can use. memory_needed: what copies take that the job's ranks keep on this node.
    open_files: limit of this process. token: content of rank 0's file in `run.dir`, "" if the node does not see the file.
    model: digest of every file of the model, by name. model_error: why the model cannot be used, or "".
    data: digest of every data file, by config key. data_error: why the data or one of the user's functions cannot be used, or
    ""; also "" on nodes that do not train.
    servers_error: why rollout servers cannot be started on this node, or ""; also "" on nodes that start none.
    """

    number: int
    host: str
    clock: float
    versions: dict[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    run_dir_free: int = 0
    shm_free: int = 0
    memory_free: int = 0
    memory_needed: int = 0
    open_files: int = 0
    token: str = ""
    model: dict[str, str] = field(default_factory=dict)
    model_error: str = ""
    data: dict[str, str] = field(default_factory=dict)
    data_error: str = ""
    servers_error: str = ""

    @property
    def name(self) -> str:
        """The node's name in findings."""
        return f"node {self.number} ({self.host})"


def collect(config: Config, world_size: int, *, clock: float, token_file: Path) -> NodeFacts:
    """The facts of this node. token_file: rank 0's file; this waits at most five seconds for it."""
    import torch

    count = torch.cuda.device_count() if config.run.platform == "cuda" else 0
    model, model_error = _model(config, world_size)
    data, data_error = _data(config)
    return NodeFacts(
        number=int(os.environ.get("GROUP_RANK", "0")),
        host=socket.gethostname(),
        clock=clock,
        versions={"python": python_platform.python_version()} | {name: package_version(name) for name in PACKAGES},
        devices=tuple(torch.cuda.get_device_name(device) for device in range(count)),
        run_dir_free=_free(Path(config.run.dir)),
        shm_free=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        memory_free=_memory_free(),
        memory_needed=_memory_needed(config, world_size),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        token=_read_token(token_file),
        model=model,
        model_error=model_error,
        data=data,
        data_error=data_error,
        servers_error=_servers(config),
    )


def package_version(package: str) -> str:
    """The installed version, or "-"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _free(path: Path) -> int:
    """Free bytes on the disk of `path` or its closest existing parent; 0 if it is not accessible."""
    path = path.absolute()
    try:
        return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
    except OSError:
        return 0  # raising here would leave the other nodes waiting for this one's facts


def _memory_free() -> int:
    """Linux's MemAvailable: free memory, and what caches of files can give back. On other systems all of the memory."""
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _memory_needed(config: Config, world_size: int) -> int:
    """See `host_bytes`; 0 on nodes that do not train, and for a model that another check refuses."""
    from etr_megatron.checks import dedicated_nodes
    from etr_megatron.planner.host import host_bytes
    from etr_megatron.weights import read_architecture

    if config.model.path == "tiny" or server_node_index(dedicated_nodes(config)) is not None:
        return 0
    first = int(os.environ.get("RANK", "0"))
    try:
        node = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return host_bytes(config, read_architecture(config.model.path), node, world_size)
    except (UserError, ValueError):
        return 0


def _read_token(file: Path, wait_s: float = 5.0) -> str:
    """The token; retries, because network file systems may show a new file late."""
    end = time.monotonic() + wait_s
    while True:
        try:
            return file.read_text()
        except OSError:
            if time.monotonic() > end:
                return ""
            time.sleep(0.1)


def _model(config: Config, world_size: int) -> tuple[dict[str, str], str]:
    """(digests of the model's files by name, why it cannot be used)."""
    from etr_megatron.checks import check_model

    if config.model.path == "tiny":
        return {"tiny": ""}, ""
    try:
        with path_errors():
            check_model(config, world_size)
            found = (file for pattern in _MODEL_FILES for file in Path(config.model.path).glob(pattern))
            return {file.name: _digest(file) for file in found if file.is_file()}, ""
    except UserError as error:
        return {}, str(error)


def _data(config: Config) -> tuple[dict[str, str], str]:
    """(digests of the data files by config key, why data or a function cannot be used) on a node that trains.

    A hub dataset is not fetched here.
    """
    from etr_megatron.check_functions import check_functions
    from etr_megatron.checks import check_problems, dedicated_nodes

    if server_node_index(dedicated_nodes(config)) is not None:
        return {}, ""
    files = [source for source in sources_of(config.data) if source.is_file]
    if problems := problems_of((lambda: check_problems(files, config), lambda: check_functions(config))):
        return {}, "; ".join(problems)
    paths = {source.key: source.location for source in files} | ({"data.tools": config.data.tools} if config.data.tools else {})
    return {key: _digest(Path(path)) for key, path in paths.items()}, ""


def _digest(file: Path) -> str:
    """Hash of the size and of samples of the content. It takes milliseconds for any size. The first sample covers the beginning
    of a safetensors header."""
    size, found = file.stat().st_size, hashlib.sha256()
    found.update(str(size).encode())
    with file.open("rb") as opened:
        for number in range(_SAMPLES):
            opened.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            found.update(opened.read(_SAMPLE_BYTES))
    return found.hexdigest()[:12]


def _servers(config: Config) -> str:
    """Why the servers' interpreter cannot be used, on nodes that start servers or the router."""
    from etr_megatron.checks import has_servers, starts_servers

    has_router = has_servers(config) and config.sglang.router is not None and os.environ.get("GROUP_RANK", "0") == "0"
    if not (starts_servers(config) or has_router) or shutil.which(config.sglang.python):
        return ""
    return f"sglang.python={config.sglang.python} is not an executable"
