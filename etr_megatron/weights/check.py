"""Does a checkpoint directory hold the model that its config.json describes? From names and shapes alone."""

from __future__ import annotations

from pathlib import Path

from etr_megatron.errors import UserError
from etr_megatron.weights.architecture import Architecture, read_architecture
from etr_megatron.weights.fp8_dir import open_checkpoint
from etr_megatron.weights.listing import listed
from etr_megatron.weights.map import weights_of
from etr_megatron.weights.safetensors_dir import SafetensorsDir
from etr_megatron.weights.shards import megatron_shard
from etr_megatron.weights.torch_dist_dir import TorchDistDir, is_torch_dist

Shape = tuple[int, ...]


def check_checkpoint(model_dir: str | Path, *, named: str = "model.path") -> Architecture:
    """Compare config.json with the tensors of a HuggingFace or `torch_dist` directory and return the architecture.

    named: see `read_architecture`. The tensors are those of `open_checkpoint`, which reads FP8 as bf16. Raises UserError naming
    up to ten differences of each kind: missing tensors, those of another shape, those that no row of the weight map knows. (A
    config that does not fit its weights loads silently as garbage elsewhere.) Of a `torch_dist` directory the files' lengths
    are compared with what is said to lie in them as well.
    """
    arch = read_architecture(model_dir, named=named)
    if is_torch_dist(model_dir):
        check_torch_dist(TorchDistDir(model_dir), arch)
    else:
        _check_safetensors(open_checkpoint(model_dir), arch)
    return arch


def _check_safetensors(checkpoint: SafetensorsDir, arch: Architecture) -> None:
    wanted = {name: shape for weight in weights_of(arch) for name, shape in zip(weight.hf, weight.shapes, strict=True)}
    # A tied head may be stored twice, and old checkpoints carry rotary buffers.
    spare = {"lm_head.weight"} - wanted.keys() if arch.tied_embeddings else set()
    found = {
        name: shape
        for name, shape in checkpoint.shapes().items()
        if name not in spare and not name.endswith("rotary_emb.inv_freq")
    }
    _refuse_difference(checkpoint.path, arch, wanted, found)


def check_torch_dist(checkpoint: TorchDistDir, arch: Architecture) -> None:
    """The same for a `torch_dist` directory and an architecture that comes from elsewhere. Raises UserError."""
    wanted = stored_shapes(arch)
    found = checkpoint.shapes()
    for weight in weights_of(arch):
        # How many rows of padding a vocabulary has depends on the layout that wrote it.
        name = weight.stored
        if weight.split == "vocab" and name in found and found[name][0] >= arch.vocab_size:
            wanted[name] = (found[name][0], *wanted[name][1:])
    _refuse_difference(checkpoint.path, arch, wanted, found, _contents(arch))
    checkpoint.refuse_gaps(wanted)


def _contents(arch: Architecture) -> dict[str, str]:
    """What of the HuggingFace tensors a stored one consists of, in words."""
    found: dict[str, str] = {}
    for weight in weights_of(arch):
        parts = " over ".join(name.removeprefix(f"model.layers.{weight.layer}.") for name in weight.hf)
        layers = [size for index, (_, size) in enumerate(weight.stored_at) if index == 0 and weight.layer is not None]
        found.setdefault(weight.stored, parts + "".join(f", of {size} layers" for size in layers))
    return found


def stored_shapes(arch: Architecture) -> dict[str, Shape]:
    """Name and global shape of every tensor that a `torch_dist` checkpoint of this architecture holds, in the model's order.

    The vocabulary is padded as for TP1.
    """
    return {
        weight.stored: (*(size for _, size in weight.stored_at), *megatron_shard(weight, arch, 1, 0).shape)
        for weight in weights_of(arch)
    }


def _refuse_difference(
    path: Path, arch: Architecture, wanted: dict[str, Shape], found: dict[str, Shape], contents: dict[str, str] | None = None
) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    other = [
        f"{name}{f' ({contents[name]})' if contents else ''} has shape {list(found[name])} where config.json says {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    kinds = (
        (f"{_tensors(missing)} missing", missing),
        (f"{_tensors(other)} of another shape", other),
        (f"{_tensors(extra)} unknown to the {arch.family} family", extra),
    )
    problems = [f"{what} ({listed(names)})" for what, names in kinds if names]
    if problems:
        raise UserError(f"{path}: config.json does not fit the weights: {'; '.join(problems)}")


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"
