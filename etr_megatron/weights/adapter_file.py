"""The mark of a checkpoint of low-rank adapters."""

from __future__ import annotations

from pathlib import Path

from etr_megatron.errors import UserError

ADAPTER_FILE = "lora.json"
"""Marks a checkpoint that holds adapters alone, and says which (`LowRank.as_json`)."""


def holds_adapters(path: str | Path) -> bool:
    """Whether the directory is a checkpoint of adapters."""
    return (Path(path) / ADAPTER_FILE).is_file()


def refuse_adapters(path: str | Path, named: str) -> None:
    """Raise UserError for a checkpoint of adapters where a model belongs, which the setting `named` gives."""
    if holds_adapters(path):
        raise UserError(
            f"{named} {path} holds adapters (LoRA) and no model; merge them with the model that they belong to first: "
            f"tools/convert_hf.py to-hf --megatron {path} --out DIR"
        )
