"""Versions, hardware and date of an experiment."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment(repo: Path) -> dict[str, Any]:
    """Versions, CPU model, cores, date and commit (None without git; ends with `+` if files differ from the commit)."""
    return {
        "torch": version("torch"),
        "megatron_core": version("megatron-core"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "commit": _commit(repo),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the kernel reports it, else the architecture."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit(repo: Path) -> str | None:
    if not (repo / ".git").exists():
        return None
    try:
        head = _git(repo, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(repo, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository without commits
        return None


def _git(repo: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=repo, check=True, capture_output=True, text=True).stdout.strip()
