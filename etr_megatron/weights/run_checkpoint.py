"""Files and keys that describe a training run's checkpoint, for readers other than the trainer."""

from __future__ import annotations

from pathlib import Path

from etr_megatron.errors import UserError

LORA_FILE = "lora.json"
"""File that marks a checkpoint of adapters; contains `LowRank.as_json`."""

TRAINER_FILE = "trainer.json"
"""File that is written last into a run's checkpoint: the non-tensor state, and the layout that wrote the checkpoint."""

BASE_SUM = "lora_base"
"""Key of `TRAINER_FILE`: the `bit_sum` of all weights with adapters as they were before training, modulo 2**64."""

BASE_DTYPE = "lora_dtype"
"""Key of `TRAINER_FILE`: the run's `model.dtype`. The run holds these weights in it, and rounds merged weights to it."""


def holds_adapters(path: str | Path) -> bool:
    """Whether the directory is a checkpoint of adapters."""
    return (Path(path) / LORA_FILE).is_file()


def refuse_adapters(path: str | Path, named: str) -> None:
    """Raise UserError if the directory is a checkpoint of adapters although the setting `named` needs a model."""
    if holds_adapters(path):
        raise UserError(
            f"{named} {path} holds adapters (LoRA) and no model; merge them with the model that they belong to first: "
            f"tools/convert_hf.py to-hf --megatron {path} --out DIR"
        )
