"""A HuggingFace checkpoint directory as a set of tensors, any range of which can be read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.platform.files import entries
from etr_megatron.weights.file_tensor import FileTensor, Index, Span
from etr_megatron.weights.listing import listed

INDEX = "model.safetensors.index.json"

_ALONE = "model.safetensors"
"""The file of a checkpoint without an index. If both exist, transformers prefers this file and SGLang the index."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Type names of the file format -> torch dtypes."""


class SafetensorsDir:
    """Reads ranges of the tensors in `*.safetensors` of a directory, by plain reads of the requested bytes.

    If there is an index, a tensor is read from the file that the index names, even if other files hold a tensor of that name.
    Raises UserError in these cases:

    - There is no safetensors file, or a file is truncated or broken (the message names it).
    - A tensor has a type that is not in `DTYPES`.
    - A tensor is not in the file that the index names, or it is in two files and no index names one of them.
    - There are two checkpoints, one with an index and one without.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.path = Path(model_dir)
        self._stored: dict[str, FileTensor] = {}
        placed = _index(self.path)
        for file in _files(self.path, set(placed.values())):
            try:
                found = _read_header(file)
            except PermissionError as error:
                raise UserError(f"{file} cannot be read ({error.strerror})") from None
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{file} is not a complete safetensors file ({error}); fetch the checkpoint again") from None
            for name, stored in found.items():
                if placed.get(name, file.name) == file.name:
                    self._add(name, stored)
        missing = [f"{name} in {file}" for name, file in placed.items() if name not in self._stored]
        if missing:
            raise UserError(f"{self.path / INDEX} names missing tensors: {listed(missing)}; fetch the checkpoint again")

    def _add(self, name: str, stored: FileTensor) -> None:
        if name in self._stored:
            files = f"{self._stored[name].file.name} and {stored.file.name}"
            raise UserError(f"{self.path}: {name} is in both {files}; remove the file that is not part of the checkpoint")
        self._stored[name] = stored

    def shapes(self) -> dict[str, Index]:
        """Shape of every tensor, from the files' headers."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from its file's header."""
        return self._stored[name].dtype

    def span(self, name: str, begin: Index, size: Index) -> Span | None:
        """Where a box is, if it is contiguous in its file, else None."""
        return self._stored[name].span(begin, size)

    def read(self, name: str, begin: Index, size: Index) -> Tensor:
        """A box of the tensor as a new CPU tensor: `size` elements from `begin` in each dimension."""
        out = torch.empty(size, dtype=self.dtype(name))
        self.read_into(name, begin, out)
        return out

    def read_into(self, name: str, begin: Index, out: Tensor) -> None:
        """Fill `out` (contiguous, on the CPU, of the stored type) with the box of its shape that starts at `begin`.

        Raises UserError when the file ends too early.
        """
        self._stored[name].read_into(begin, out)


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> name of its file, from the directory's index; empty without one. Raises UserError for a broken index."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        content = json.loads(index.read_text())
        placed = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
            raise ValueError("it has no weight_map with a file for each tensor")
    except (OSError, ValueError) as error:
        raise UserError(f"{index} is broken ({error}); fetch the checkpoint again") from None
    return placed


def _files(folder: Path, wanted: set[str]) -> list[Path]:
    """The directory's safetensors files; only those that its index names (`wanted`), if it has one."""
    files = sorted(entries(folder, "*.safetensors"))
    if wanted and _ALONE not in wanted and folder / _ALONE in files:
        raise UserError(f"{folder} holds {_ALONE} and an {INDEX} that does not name it; remove the one that is out of date")
    missing = sorted(wanted - {file.name for file in files})
    if missing:
        raise UserError(f"{folder / INDEX} names {missing[0]}, which does not exist; fetch the checkpoint again")
    if wanted:
        files = [file for file in files if file.name in wanted]
    if not files:
        other = sorted(file.name for pattern in ("*.bin", "*.pth") for file in folder.glob(pattern))
        if other:
            raise UserError(
                f"{folder} holds {other[0]} but no .safetensors file, the only supported format; convert the model with "
                "save_pretrained of transformers"
            )
        raise UserError(f"{folder} holds no .safetensors file; it is not a HuggingFace checkpoint directory")
    return files


def _read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file. Raises ValueError, KeyError or TypeError when the header does not fit the file, UserError for an
    unknown type."""
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        first = file.read(8)
        if first == b"version ":
            raise ValueError("it is a Git LFS pointer: git lfs pull fetches the file itself")
        length = int.from_bytes(first, "little")
        if total < 8 or length > total - 8:
            raise ValueError(f"its header of {length} bytes does not fit into {total}")
        header: dict[str, Any] = json.loads(file.read(length))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} has type {entry['dtype']}; supported are {', '.join(DTYPES)}")
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(number, int) for number in (*shape, begin, end)):
            raise ValueError(f"{name} has a shape or an offset that is not a whole number")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {end - begin} bytes, which do not match its shape {list(shape)}")
        if not 0 <= begin <= end <= total - 8 - length:
            raise ValueError(f"{name} ends {end - (total - 8 - length)} bytes after the end of the file")
        found[name] = FileTensor(path, 8 + length + begin, dtype, shape)
    return found
