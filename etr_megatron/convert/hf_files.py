"""The files beside the weights of a HuggingFace checkpoint: config, tokenizer, generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from etr_megatron.platform.files import write_atomically

_KINDS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = ("config.json", "metadata.json", "trainer.json", "warm_start.json")
"""config.json is rewritten; metadata.json and trainer.json belong to a torch_dist checkpoint, warm_start.json to the tiny
policy (`data/tiny.py`)."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of `--dtype`."""


def copy_hf_files(source: Path, target: Path, dtypes: set[torch.dtype], quantization: dict[str, Any] | None = None) -> None:
    """Copy everything but weights; config.json is given the weights' new type and quantisation.

    dtypes: dtypes of the written tensors, before quantisation, without the tensors that are always float32. If there are
    several, config.json keeps its own type.
    """
    for file in sorted(source.iterdir()):
        is_index = file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _KINDS and file.name not in _NOT_COPIED and not is_index:
            shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
    config = json.loads((source / "config.json").read_text())
    if len(dtypes) == 1:
        # transformers 5 writes dtype, older versions torch_dtype; a config that was written by both versions has both keys.
        for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
            config[key] = str(*dtypes).removeprefix("torch.")
    config.pop("quantization_config", None)  # it describes the source's weights
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0  # such layers are not converted
    if quantization is not None:
        config["quantization_config"] = quantization
    write_atomically(target / "config.json", (json.dumps(config, indent=2) + "\n").encode())
