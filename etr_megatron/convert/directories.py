"""Checks all directories that a command names before any other work, so that several mistakes are reported at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from etr_megatron.convert.output import refuse_existing
from etr_megatron.convert.ranks import Ranks
from etr_megatron.convert.source import refuse_no_directory
from etr_megatron.platform.files import refuse_all
from etr_megatron.weights import read_architecture


def check_directories(ranks: Ranks, *, hf: Path | None = None, megatron: Path | None = None, out: Path | None = None) -> None:
    """Raise one UserError for all of these that are invalid. A collective; only config.json is read."""
    checks: list[Callable[[], object]] = []
    if hf is not None:
        checks.append(lambda: read_architecture(hf, named="--hf"))
    if megatron is not None:
        checks.append(lambda: refuse_no_directory(megatron))
    if out is not None:
        checks.append(lambda: refuse_existing(out))
    ranks.on_all_ranks(lambda: refuse_all(*checks))
