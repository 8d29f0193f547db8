"""Checks that a checkpoint directory holds the model that its config.json describes, by names, shapes and types; by values only
on request."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from etr_megatron.errors import UserError
from etr_megatron.weights.architecture import BIASED_ROUTERS, Architecture, read_architecture
from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.fp8_dir import open_checkpoint
from etr_megatron.weights.listing import LIMIT, listed
from etr_megatron.weights.map import EMBEDDING, HEAD, hf_name, weights_of
from etr_megatron.weights.safetensors_dir import SafetensorsDir
from etr_megatron.weights.shards import megatron_shard
from etr_megatron.weights.torch_dist_dir import TorchDistDir, is_torch_dist

_SHAPES = 3
"""Number of tensors whose two shapes are reported: more would make an unreadable message."""

_PANEL_BYTES = 2**24
"""Bytes of a tensor that are compared at a time."""


def check_checkpoint(model_dir: str | Path, *, named: str = "model.path", values: bool = False) -> Architecture:
    """Compare config.json with the tensors of a HuggingFace or `torch_dist` directory and return the architecture.

    named: see `read_architecture`. The tensors are those of `open_checkpoint`, which reads FP8 as bf16. Raises UserError naming
    a few differences of each kind: missing tensors, tensors of another shape, tensors unknown to the weight map, integer
    tensors. (Elsewhere a config that does not fit its weights silently loads garbage.) In a `torch_dist` directory the files
    must also be long enough for what they should hold, and the chunks must make up every tensor.

    values: if a tied head is stored beside the embedding, read both and refuse a head with other values: they would be lost.
    """
    arch = read_architecture(model_dir, named=named)
    if is_torch_dist(model_dir):
        check_torch_dist(TorchDistDir(model_dir), arch)
    else:
        checkpoint = open_checkpoint(model_dir)
        check_safetensors(checkpoint, arch)
        if values:
            _refuse_head_of_its_own(checkpoint, arch)
    return arch


def check_safetensors(checkpoint: SafetensorsDir, arch: Architecture) -> None:
    """As `check_checkpoint`, for an open HuggingFace directory and a given architecture. Raises UserError."""
    wanted = {name: shape for weight in weights_of(arch) for name, shape in zip(weight.hf, weight.shapes, strict=True)}
    found = _used(checkpoint, arch)
    embedding, head = hf_name(arch.family, EMBEDDING), hf_name(arch.family, HEAD)
    if arch.tied_embeddings and head in found:  # some checkpoints store it twice
        wanted[head] = wanted[embedding]
    _refuse_difference(checkpoint.path, arch, wanted, found)
    _refuse_integers(checkpoint, wanted)


def _used(checkpoint: SafetensorsDir | TorchDistDir, arch: Architecture) -> dict[str, Index]:
    """Shapes of a checkpoint's tensors, except rotary frequencies and layers for multi-token prediction."""
    drafts = tuple(f"model.layers.{arch.layers + number}." for number in range(arch.mtp_layers))
    if drafts:
        drafts += ("mtp.",)  # Megatron's name
    return {
        name: shape
        for name, shape in checkpoint.shapes().items()
        if not name.endswith("rotary_emb.inv_freq") and not name.startswith(drafts)
    }


def _refuse_head_of_its_own(checkpoint: SafetensorsDir, arch: Architecture) -> None:
    embedding, head = hf_name(arch.family, EMBEDDING), hf_name(arch.family, HEAD)
    if not arch.tied_embeddings or head not in checkpoint.shapes():
        return
    rows, width = checkpoint.shapes()[embedding]
    step = max(1, _PANEL_BYTES // (width * checkpoint.dtype(embedding).itemsize))
    for first in range(0, rows, step):
        box = (first, 0), (min(step, rows - first), width)
        if not torch.equal(checkpoint.read(head, *box), checkpoint.read(embedding, *box)):
            raise UserError(
                f"{checkpoint.path}: config.json says tie_word_embeddings, but {head} holds other values than {embedding}; "
                f"set tie_word_embeddings to false, or remove {head} if it is a leftover"
            )


def check_torch_dist(checkpoint: TorchDistDir, arch: Architecture) -> None:
    """As `check_checkpoint`, for a `torch_dist` directory and a given architecture. Raises UserError."""
    wanted = stored_shapes(arch)
    found = _used(checkpoint, arch)
    for weight in weights_of(arch):
        # The number of padding rows of a vocabulary depends on the layout that wrote it.
        name = weight.stored
        if weight.split == "vocab" and name in found and found[name][0] >= arch.vocab_size:
            wanted[name] = (found[name][0], *wanted[name][1:])
    _refuse_difference(checkpoint.path, arch, wanted, found, _contents(arch))
    _refuse_integers(checkpoint, wanted)
    checkpoint.refuse_gaps(wanted)


def _contents(arch: Architecture) -> dict[str, str]:
    """Stored tensor -> the HuggingFace tensors that it consists of, in words."""
    found: dict[str, str] = {}
    for weight in weights_of(arch):
        in_layer = (name if weight.layer is None else name.partition(f".{weight.layer}.")[2] for name in weight.hf)
        of_all_layers = len(weight.stored_at) > (weight.expert is not None)  # an expert has an axis of its own
        found.setdefault(weight.stored, " over ".join(in_layer) + (f", of {arch.layers} layers" if of_all_layers else ""))
    return found


def stored_shapes(arch: Architecture) -> dict[str, Index]:
    """Name and global shape of every tensor that a `torch_dist` checkpoint of this architecture holds, in the model's order.

    The vocabulary is padded as for TP1.
    """
    return {
        weight.stored: (*(size for _, size in weight.stored_at), *megatron_shard(weight, arch, 1, 0).shape)
        for weight in weights_of(arch)
    }


def _refuse_difference(
    path: Path, arch: Architecture, wanted: dict[str, Index], found: dict[str, Index], contents: dict[str, str] | None = None
) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    other = [
        f"{name}{f' ({contents[name]})' if contents else ''} has shape {list(found[name])} where config.json says {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    kinds = (
        (f"{_tensors(missing)} missing", missing, LIMIT),
        (f"{_tensors(other)} of another shape", other, _SHAPES),
        (f"{_tensors(extra)} unknown to the {arch.family} family with {arch.layers} layers", extra, LIMIT),
    )
    problems = [f"{what} ({listed(names, limit=limit)})" for what, names, limit in kinds if names]
    if arch.family in BIASED_ROUTERS and any(name.startswith(f"model.layers.{arch.layers}.") for name in extra):
        problems.append("if there are layers for multi-token prediction, set num_nextn_predict_layers to their number")
    if problems:
        raise UserError(f"{path}: config.json does not fit the weights: {'; '.join(problems)}")


def _refuse_integers(checkpoint: SafetensorsDir | TorchDistDir, names: Iterable[str]) -> None:
    """Raise UserError for integer tensors: weights that are quantised although config.json does not say so."""
    found = [f"{name} of {checkpoint.dtype(name)}" for name in names if not checkpoint.dtype(name).is_floating_point]
    if found:
        raise UserError(f"{checkpoint.path}: weights must be floating-point numbers, unlike {listed(found, limit=_SHAPES)}")


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"
