"""The directories that a command names, looked at together: who has mistaken two of them is told both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from etr_megatron.convert.output import refuse_existing
from etr_megatron.convert.ranks import Ranks
from etr_megatron.convert.source import refuse_no_directory
from etr_megatron.errors import UserError
from etr_megatron.platform.files import path_errors
from etr_megatron.weights import read_architecture


def refuse_mistaken(ranks: Ranks, *, hf: Path | None = None, megatron: Path | None = None, out: Path | None = None) -> None:
    """Raise one UserError for all of these that cannot be meant. A collective; nothing but config.json is read."""
    looks: list[tuple[Path | None, Callable[[Path], object]]] = [
        (hf, lambda path: read_architecture(path, named="--hf")),
        (megatron, refuse_no_directory),
        (out, refuse_existing),
    ]

    def look() -> None:
        problems = []
        for path, check in looks:
            try:
                with path_errors():
                    if path is not None:
                        check(path)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))

    ranks.together(look)
