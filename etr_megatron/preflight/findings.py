"""Findings from the facts of all nodes. Every check is a pure function that returns one finding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from etr_megatron.preflight.facts import NodeFacts

State = Literal["ok", "warning", "FAILED"]

CLOCK_SKEW_S = 1.0
"""Clock skew in seconds up to which times in logs and file systems can be compared."""
SHM_BYTES = 1 << 30
"""Least /dev/shm. A container's default of 64 MiB is too small for NCCL and data workers."""
OPEN_FILES = 4096
"""Least limit of open files: enough for a rank's sockets to all other ranks, checkpoints and data."""


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    check: str
    state: State
    detail: str


def findings(nodes: Sequence[NodeFacts], *, token: str, needed_bytes: int) -> list[Finding]:
    """All findings from the nodes' facts. token: content of rank 0's file. needed_bytes: space for the run's checkpoints."""
    return [
        versions(nodes),
        devices(nodes),
        clocks(nodes),
        shared_directory(nodes, token),
        _each(nodes, "disk", lambda node: node.run_dir_free >= needed_bytes, _room(needed_bytes), "FAILED"),
        _each(nodes, "model", lambda node: not node.model_error, lambda node: node.model_error or "readable", "FAILED"),
        _same(nodes, "the same model", lambda node: node.model),
        _each(
            nodes, "data, reward, loss", lambda node: not node.data_error, lambda node: node.data_error or "usable", "FAILED"
        ),
        _same(nodes, "the same data", lambda node: node.data),
        _each(nodes, "rollout servers", lambda node: not node.servers_error, lambda node: node.servers_error or "-", "FAILED"),
        host_memory(nodes),
        _each(nodes, "/dev/shm", lambda node: node.shm_free >= SHM_BYTES, lambda node: f"{gib(node.shm_free)} free", "warning"),
        _each(nodes, "open files", lambda node: node.open_files >= OPEN_FILES, lambda node: f"{node.open_files}", "warning"),
    ]


def versions(nodes: Sequence[NodeFacts]) -> Finding:
    """Every node has the same package versions."""
    different = []
    for package in nodes[0].versions:
        found = _by(nodes, _version_of(package))
        if len(found) > 1:
            different.append(f"{package}: {_spell(found)}")
    if different:
        return Finding("versions", "FAILED", "; ".join(different))
    return Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in nodes[0].versions.items()))


def devices(nodes: Sequence[NodeFacts]) -> Finding:
    """Every node has the same GPUs."""
    found = _by(nodes, lambda node: f"{len(node.devices)} x {node.devices[0]}" if node.devices else "CPU")
    if len(found) > 1:
        return Finding("devices", "warning", _spell(found))
    return Finding("devices", "ok", f"{len(nodes)} nodes of {next(iter(found))}")


def clocks(nodes: Sequence[NodeFacts]) -> Finding:
    """Clocks agree. They are read right after a barrier, so the error is at most the time between ranks leaving the barrier."""
    last, first = max(nodes, key=lambda node: node.clock), min(nodes, key=lambda node: node.clock)
    skew = last.clock - first.clock
    if skew > CLOCK_SKEW_S:
        return Finding("clocks", "warning", f"{last.name} is {skew:.1f} s ahead of {first.name}")
    return Finding("clocks", "ok", f"within {skew:.3f} s")


def shared_directory(nodes: Sequence[NodeFacts], token: str) -> Finding:
    """Every node sees what rank 0 writes to `run.dir`."""
    blind = [node.name for node in nodes if node.token != token]
    if blind:
        return Finding("run.dir is shared", "FAILED", f"{', '.join(blind)} cannot see what rank 0 writes there")
    return Finding("run.dir is shared", "ok", f"all {len(nodes)} nodes see it")


def host_memory(nodes: Sequence[NodeFacts]) -> Finding:
    """Every node has room for the copies that the job keeps there."""
    lacking = [node for node in nodes if node.memory_free < node.memory_needed]
    if lacking:
        copies = _by(lacking, lambda node: f"{gib(node.memory_free)} free, the job's copies take {gib(node.memory_needed)}")
        return Finding("host memory", "FAILED", _spell(copies))
    most = max(node.memory_needed for node in nodes)
    copies_take = f", the job's copies take {gib(most)}" if most else ""
    return Finding("host memory", "ok", f"at least {gib(min(node.memory_free for node in nodes))} free{copies_take}")


def table(found: Sequence[Finding]) -> str:
    """The findings as text, one line each, failures last."""
    order = sorted(found, key=lambda one: ("ok", "warning", "FAILED").index(one.state))
    checks, states = (max(len(getattr(one, key)) for one in found) for key in ("check", "state"))
    return "\n".join(f"{one.check:{checks}}  {one.state:{states}}  {one.detail}" for one in order)


def gib(count: float) -> str:
    """Bytes as text."""
    return f"{count / 2**30:.1f} GiB"


def _each(
    nodes: Sequence[NodeFacts],
    check: str,
    passes: Callable[[NodeFacts], bool],
    detail: Callable[[NodeFacts], str],
    otherwise: State,
) -> Finding:
    """A check that each node passes or fails on its own."""
    failing = [node for node in nodes if not passes(node)]
    return Finding(check, otherwise if failing else "ok", _spell(_by(failing or nodes, detail), all_nodes=not failing))


def _same(nodes: Sequence[NodeFacts], check: str, files: Callable[[NodeFacts], dict[str, str]]) -> Finding:
    """Check that the files are the same on all nodes that can read them. Compares samples of their content."""
    readable = [node for node in nodes if files(node)]
    names = sorted({name for node in readable for name in files(node)})
    for name in names:
        digests = _by(readable, _digest_of(name, files))
        if len(digests) > 1:
            return Finding(check, "FAILED", f"{name} differs: {_spell(digests)}")
    return Finding(check, "ok", f"{len(names)} files, by samples" if len(names) > 1 else next(iter(names), "-"))


def _room(needed: int) -> Callable[[NodeFacts], str]:
    return lambda node: f"{gib(node.run_dir_free)} free in run.dir, checkpoints take {gib(needed)}"


def _version_of(package: str) -> Callable[[NodeFacts], str]:
    return lambda node: node.versions[package]


def _digest_of(name: str, files: Callable[[NodeFacts], dict[str, str]]) -> Callable[[NodeFacts], str]:
    return lambda node: files(node).get(name, "missing")


def _by(nodes: Sequence[NodeFacts], value: Callable[[NodeFacts], str]) -> dict[str, list[str]]:
    """Names of the nodes with each value, in the order of first occurrence."""
    found = defaultdict(list)
    for node in nodes:
        found[value(node)].append(node.name)
    return dict(found)


def _spell(found: dict[str, list[str]], *, all_nodes: bool = False) -> str:
    if all_nodes and len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} on {', '.join(names[:4])}{' and others' * (len(names) > 4)}" for value, names in found.items())
