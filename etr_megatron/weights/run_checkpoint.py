"""What a training run's checkpoint says about itself, for readers that are not the trainer."""

from __future__ import annotations

from pathlib import Path

from etr_megatron.errors import UserError

LORA_FILE = "lora.json"
"""Marks a checkpoint of adapters, and has `LowRank.as_json`."""

TRAINER_FILE = "trainer.json"
"""Written last into a run's checkpoint: the non-tensor state and the layout it was made with."""

BASE_SUM = "lora_base"
"""Key of `TRAINER_FILE`: the `bit_sum` of all weights with adapters as they were before training, modulo 2**64."""

BASE_DTYPE = "lora_dtype"
"""Key of `TRAINER_FILE`: the run's `model.dtype`, in which it holds these weights, and to which merged ones are rounded."""


def holds_adapters(path: str | Path) -> bool:
    """Whether the directory is a checkpoint of adapters."""
    return (Path(path) / LORA_FILE).is_file()


def refuse_adapters(path: str | Path, named: str) -> None:
    """Raise UserError for a checkpoint of adapters where a model belongs, which the setting `named` gives."""
    if holds_adapters(path):
        raise UserError(
            f"{named} {path} holds adapters (LoRA) and no model; merge them with the model that they belong to first: "
            f"tools/convert_hf.py to-hf --megatron {path} --out DIR"
        )
