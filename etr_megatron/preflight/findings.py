"""What the facts of all nodes amount to: pure functions, one finding each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from etr_megatron.preflight.facts import NodeFacts

State = Literal["ok", "warning", "FAILED"]

CLOCK_SKEW_S = 1.0
"""Times in logs and file systems can be compared up to this."""
SHM_BYTES = 1 << 30
"""A container's default /dev/shm of 64 MiB is too small for NCCL and data workers."""
OPEN_FILES = 4096
"""Sockets of a rank to all others, checkpoints and data."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    state: State
    detail: str


def findings(nodes: Sequence[NodeFacts], *, token: str, needed_bytes: int) -> list[Finding]:
    """Everything that follows from the nodes' facts. token: what rank 0 wrote. needed_bytes: of the run's checkpoints."""
    return [
        versions(nodes),
        devices(nodes),
        clocks(nodes),
        shared_directory(nodes, token),
        _each(nodes, "disk", lambda node: node.run_dir_free >= needed_bytes, _room(needed_bytes), "FAILED"),
        _each(nodes, "model", lambda node: not node.model_error, lambda node: node.model_error or "readable", "FAILED"),
        same_model(nodes),
        _each(nodes, "rollout servers", lambda node: not node.servers_error, lambda node: node.servers_error or "-", "FAILED"),
        _each(nodes, "/dev/shm", lambda node: node.shm_free >= SHM_BYTES, lambda node: f"{gib(node.shm_free)} free", "warning"),
        _each(nodes, "open files", lambda node: node.open_files >= OPEN_FILES, lambda node: f"{node.open_files}", "warning"),
    ]


def versions(nodes: Sequence[NodeFacts]) -> Finding:
    """The same packages everywhere."""
    different = []
    for package in nodes[0].versions:
        found = _by(nodes, _version_of(package))
        if len(found) > 1:
            different.append(f"{package}: {_spell(found)}")
    if different:
        return Finding("versions", "FAILED", "; ".join(different))
    return Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in nodes[0].versions.items()))


def devices(nodes: Sequence[NodeFacts]) -> Finding:
    """The same GPUs everywhere."""
    found = _by(nodes, lambda node: f"{len(node.devices)} x {node.devices[0]}" if node.devices else "CPU")
    if len(found) > 1:
        return Finding("devices", "warning", _spell(found))
    return Finding("devices", "ok", f"{len(nodes)} nodes of {next(iter(found))}")


def clocks(nodes: Sequence[NodeFacts]) -> Finding:
    """Read right after all ranks met, so that the difference is at most the time that a meeting takes to end."""
    last, first = max(nodes, key=lambda node: node.clock), min(nodes, key=lambda node: node.clock)
    skew = last.clock - first.clock
    if skew > CLOCK_SKEW_S:
        return Finding("clocks", "warning", f"{last.name} is {skew:.1f} s ahead of {first.name}")
    return Finding("clocks", "ok", f"within {skew:.3f} s")


def shared_directory(nodes: Sequence[NodeFacts], token: str) -> Finding:
    """Every node sees what rank 0 writes into `run.dir`."""
    blind = [node.name for node in nodes if node.token != token]
    if blind:
        return Finding("run.dir is shared", "FAILED", f"{', '.join(blind)} cannot see what rank 0 writes there")
    return Finding("run.dir is shared", "ok", f"all {len(nodes)} nodes see it")


def same_model(nodes: Sequence[NodeFacts]) -> Finding:
    """The model's files are the same on all nodes that can read it, as far as samples of them tell."""
    readable = [node for node in nodes if node.model]
    names = sorted({name for node in readable for name in node.model})
    for name in names:
        found = _by(readable, _model_file(name))
        if len(found) > 1:
            return Finding("the same model", "FAILED", f"{name} differs: {_spell(found)}")
    return Finding("the same model", "ok", f"{len(names)} files, by samples" if len(names) > 1 else next(iter(names), "-"))


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
    """A check that every node passes by itself."""
    failing = [node for node in nodes if not passes(node)]
    return Finding(check, otherwise if failing else "ok", _spell(_by(failing or nodes, detail), all_nodes=not failing))


def _room(needed: int) -> Callable[[NodeFacts], str]:
    return lambda node: f"{gib(node.run_dir_free)} free in run.dir, checkpoints take {gib(needed)}"


def _version_of(package: str) -> Callable[[NodeFacts], str]:
    return lambda node: node.versions[package]


def _model_file(name: str) -> Callable[[NodeFacts], str]:
    return lambda node: node.model.get(name, "missing")


def _by(nodes: Sequence[NodeFacts], value: Callable[[NodeFacts], str]) -> dict[str, list[str]]:
    """Names of the nodes with each value, in the order met."""
    found = defaultdict(list)
    for node in nodes:
        found[value(node)].append(node.name)
    return dict(found)


def _spell(found: dict[str, list[str]], *, all_nodes: bool = False) -> str:
    if all_nodes and len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} on {', '.join(names[:4])}{' and others' * (len(names) > 4)}" for value, names in found.items())
