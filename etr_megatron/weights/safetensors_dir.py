"""A HuggingFace checkpoint directory as a set of tensors of which any range can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.weights.architecture import Architecture, read_architecture
from etr_megatron.weights.map import weights_of


class SafetensorsDir:
    """Reads ranges of the tensors in `*.safetensors` of a directory; files are memory-mapped, only touched pages are read.

    Raises UserError when the directory holds no safetensors file, or one that is cut off or broken (naming it).
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.path = Path(model_dir)
        files = sorted(self.path.glob("*.safetensors"))
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                wanted = set(json.loads(index.read_text())["weight_map"].values())
            except (json.JSONDecodeError, KeyError) as error:
                raise UserError(f"{index} is broken ({error}); fetch the checkpoint again") from None
            missing = sorted(wanted - {file.name for file in files})
            if missing:
                raise UserError(f"{index} names {missing[0]}, which is not there; fetch the checkpoint again")
            files = [file for file in files if file.name in wanted]
        if not files:
            raise UserError(f"{self.path} holds no .safetensors file; model.path must be a HuggingFace checkpoint directory")
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt")
            except SafetensorError as error:
                raise UserError(f"{file} is not a complete safetensors file ({error}); fetch the checkpoint again") from None
            self._where.update(dict.fromkeys(handle.keys(), handle))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the files' headers."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._where.items()}

    def read(self, name: str, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """A box of the tensor: `size` elements from `begin` in each dimension."""
        ranges = tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))
        return self._where[name].get_slice(name)[ranges]


def check_checkpoint(model_dir: str | Path) -> Architecture:
    """Compare config.json with the tensors' names and shapes, from the headers alone, and return the architecture.

    Raises UserError naming the first difference of each kind: a missing tensor, one of another shape, one that no row of the
    weight map knows. (A config that does not fit its weights loads silently as garbage elsewhere.)
    """
    arch = read_architecture(model_dir)
    found = SafetensorsDir(model_dir).shapes()
    wanted = {name: shape for weight in weights_of(arch) for name, shape in zip(weight.hf, weight.shapes, strict=True)}
    problems = []
    missing = [name for name in wanted if name not in found]
    if missing:
        problems.append(f"{len(missing)} tensors are missing, first {missing[0]}")
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            problems.append(f"{name} has shape {list(found[name])} where config.json says {list(shape)}")
            break
    # A tied head may be stored twice, and old checkpoints carry rotary buffers.
    known = {*wanted, "lm_head.weight"} if arch.tied_embeddings else set(wanted)
    extra = [name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        problems.append(f"{len(extra)} tensors are unknown to the {arch.family} family, first {extra[0]}")
    if problems:
        raise UserError(f"{model_dir}: config.json does not fit the weights: {'; '.join(problems)}")
    return arch
