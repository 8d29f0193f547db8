"""Reads `.metadata` of a `torch_dist` checkpoint without the libraries that wrote it.

torch's classes take a second to import, some versions of Megatron write classes of their own, and a pickle can call arbitrary
code. So plain records replace all these classes, and a file that names anything else is refused.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any

import torch

from etr_megatron.errors import UserError

METADATA_FILE = ".metadata"
"""torch writes this file last into a `torch_dist` checkpoint."""


class Record:
    """Stands in for an object of a class that is not imported, with its stored attributes; a state that is not a dict becomes
    the attribute `state`."""

    def __init__(self, *_arguments: Any) -> None: ...

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


_PLAIN = {
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,
    ("torch", "Size"): torch.Size,
}
_RECORDS = ("torch.distributed.checkpoint.", "torch.serialization", "megatron.core.dist_checkpointing.")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module.startswith(_RECORDS):
            return type(name, (Record,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(folder: Path) -> Record:
    """Torch's `Metadata` of a `torch_dist` directory. Raises UserError when it is missing or cannot be read."""
    file = folder / METADATA_FILE
    try:
        with open(file, "rb") as stream:
            metadata = _Unpickler(stream).load()
    except PermissionError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: {folder} is not a complete torch_dist checkpoint") from None
    except Exception as error:  # a pickle that is cut off or altered can raise anything
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error}); fetch the checkpoint again") from None
    if not isinstance(getattr(metadata, "storage_data", None), dict):
        raise UserError(f"{file} is not the metadata of a torch_dist checkpoint")
    return metadata


def dtype_of(entry: Record) -> torch.dtype:
    """Type of a stored tensor, from its `TensorStorageMetadata`, whose properties are stored as a tuple."""
    return entry.properties.state[0]
