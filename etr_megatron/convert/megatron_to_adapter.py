"""Converts a run's checkpoint of adapters to a directory that PEFT and servers load on top of the adapters' base model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etr_megatron.convert.output import output_directory
from etr_megatron.convert.progress import progress_bar
from etr_megatron.convert.ranks import Ranks
from etr_megatron.convert.safetensors_writer import SafetensorsWriter, TensorToWrite
from etr_megatron.convert.source import find_megatron
from etr_megatron.errors import UserError
from etr_megatron.platform.files import write_atomically
from etr_megatron.weights import (
    Adapter,
    AdapterDir,
    Architecture,
    LowRank,
    Weight,
    is_torch_dist,
    read_architecture,
    weights_of,
)

_FUSED_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""Names of modules that PEFT takes for experts, and only for experts, if a model has experts."""


@dataclass(frozen=True)
class _Module:
    """A linear module of the output. adapter: its adapter; None if zeros are written, because a module of its group has one."""

    name: str
    rows: int
    columns: int
    adapter: Adapter | None

    def tensors(self, rank: int, dtype: torch.dtype) -> tuple[TensorToWrite, TensorToWrite]:
        """The tensors to write for this module, A and B of the given rank."""
        prefix = f"base_model.model.{self.name}"
        return (
            TensorToWrite(f"{prefix}.lora_A.weight", dtype, (rank, self.columns)),
            TensorToWrite(f"{prefix}.lora_B.weight", dtype, (self.rows, rank)),
        )


def to_adapter(
    megatron: Path,
    out: Path,
    ranks: Ranks,
    *,
    dtype: torch.dtype | None = None,
    config_from: Path | None = None,
    base: Path | None = None,
) -> int:
    """Write the adapters of a run's checkpoint, or of a run, in PEFT's format to `out`. A collective.

    All adapters get the largest rank, since servers support only one rank; smaller ones are padded with zeros. If one of
    several modules that servers fuse, or one module of an expert, is adapted, all of them are written, the others as zeros.

    dtype: None keeps float32, as they are trained. config_from, base: see `find_megatron`. Returns the bytes of all tensors.
    Raises UserError for a checkpoint of a whole model, or one that does not fit the config.json, and as `output_directory`.
    """
    model, arch, source = ranks.on_all_ranks(lambda: _open(megatron, config_from, base))
    modules = list(_modules(arch, source.low_rank))
    rank = max(module.adapter.rank for module in modules if module.adapter)
    tensors = [module.tensors(rank, dtype or torch.float32) for module in modules]
    sizes = [sum(tensor.nbytes for tensor in pair) for pair in tensors]
    mine = ranks.share(sizes)
    with output_directory(out, sum(sizes), ranks) as folder:
        listed = [tensor for pair in tensors for tensor in pair]
        writer = ranks.on_all_ranks(lambda: SafetensorsWriter(folder, listed, None, "adapter_model"))
        ranks.on_rank0(writer.create)

        def convert() -> None:
            with progress_bar(sum(sizes[i] for i in mine), ranks) as bar:
                for i in mine:
                    for tensor, values in zip(tensors[i], _factors(modules[i], source, rank), strict=True):
                        bar.update(writer.write(tensor.name, (0, 0), values))

        ranks.on_all_ranks(convert)
        config = _config(model, arch, source.low_rank, modules, rank)
        ranks.on_rank0(lambda: write_atomically(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode()))
    return sum(sizes)


def _open(megatron: Path, config_from: Path | None, base: Path | None) -> tuple[Path, Architecture, AdapterDir]:
    """The directory of the adapters' base, its architecture, and the adapters."""
    found = find_megatron(megatron, config_from, base)
    if found.base is None:
        raise UserError(f"--adapter: {found.weights} holds a whole model and no adapters (LoRA); leave --adapter out")
    arch = read_architecture(found.config, named=found.named)
    return found.base.path, arch, AdapterDir(found.weights, arch)


def _modules(arch: Architecture, low_rank: LowRank) -> Iterator[_Module]:
    """The modules to write, in the model's order."""
    weights = [weight for weight in weights_of(arch) if weight.fp8]
    groups: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        groups[_group(weight)].append(weight)
    for weight in weights:
        if not any(low_rank.adapters_of(one) for one in groups[_group(weight)]):
            continue
        adapters = {adapter.hf: adapter for adapter in low_rank.adapters_of(weight)}
        for number, (name, (rows, columns)) in enumerate(zip(weight.hf, weight.shapes, strict=True)):
            yield _Module(name.removesuffix(".weight"), rows, columns, adapters.get(number))


def _group(weight: Weight) -> str:
    """A key that is equal for weights that a server fuses, and for all weights of an expert, which PEFT finds only together."""
    return weight.server if weight.expert is None else f"expert {weight.expert} of layer {weight.layer}"


def _factors(module: _Module, source: AdapterDir, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, columns] and B [rows, rank] in fp32, such that B A * alpha / rank is what the adapter adds to its matrix."""
    a, b = torch.zeros(rank, module.columns), torch.zeros(module.rows, rank)
    if module.adapter is not None:
        own = module.adapter.rank
        a[:own], b[:, :own] = source.pair(module.adapter)
        b *= rank / own  # the adapter's own scale is alpha / own
    return a, b


def _config(base: Path, arch: Architecture, low_rank: LowRank, modules: list[_Module], rank: int) -> dict[str, Any]:
    """The content of adapter_config.json: what PEFT writes, without fields that have PEFT's default values."""
    names, alpha = [module.name for module in modules], low_rank.alpha
    parameters = []
    if arch.experts is not None:
        # PEFT takes these names for parts of transformers' fused experts; other modules of the same name are targeted by their
        # weights' full names.
        parameters = [f"{n}.weight" for n in names if ".experts." not in n and n.rpartition(".")[2] in _FUSED_EXPERTS]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if is_torch_dist(base) else str(base.resolve()),
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in names}),
        "target_parameters": parameters or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
