"""torch_dist to HuggingFace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from etr_megatron.convert.hf_files import copy_hf_files
from etr_megatron.convert.output import output_directory
from etr_megatron.convert.progress import progress_bar
from etr_megatron.convert.quantiser import Quantiser
from etr_megatron.convert.ranks import Ranks
from etr_megatron.convert.safetensors_writer import SafetensorsWriter, TensorToWrite
from etr_megatron.convert.source import MegatronSource, find_megatron
from etr_megatron.weights import Architecture, BoxSource, Merged, Weight, read_architecture, weights_of
from etr_megatron.weights.map import EMBEDDING, HEAD, hf_name
from etr_megatron.weights.quantize import FP8, SCALE_SUFFIX, scale_shape

MAX_FILE_BYTES = 5 * 10**9
"""Bytes of tensors per output file, for years the default of transformers' `save_pretrained`."""


def to_hf(
    megatron: Path,
    out: Path,
    ranks: Ranks,
    *,
    dtype: torch.dtype | None = None,
    fp8_block: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    config_from: Path | None = None,
    base: Path | None = None,
) -> int:
    """Write the HuggingFace checkpoint of a torch_dist directory, of a run's checkpoint or of a run to `out`. A collective.

    Adapters are merged with their base, as in the run. The base is in the dtype of the run's model, and sums are rounded to
    this dtype; if neither the checkpoint nor the run's config.yaml names it, it is the dtype in which the base is stored.
    dtype: None keeps the stored values or, with adapters, the sums. fp8_block: quantise the weights that the map marks, block
    by block. If `dtype` is given, values are rounded to it first, as in a weight sync of a model in that dtype. config_from:
    where config.json and the tokenizer are. base: of adapters, the model that they were trained on; see `find_megatron` for
    both. Returns the bytes of all tensors. Raises UserError for a checkpoint that does not fit its config.json, and as
    `output_directory`.
    """
    found, arch, source = ranks.on_all_ranks(lambda: _open(megatron, config_from, base))
    weights = weights_of(arch)
    tensors = [_tensors(source, weight, dtype, fp8_block) for weight in weights]
    sizes = [sum(tensor.nbytes for tensor in some) for some in tensors]
    mine = ranks.share(sizes)
    with output_directory(out, sum(sizes), ranks) as folder:
        listed = [tensor for some in tensors for tensor in some]
        writer = ranks.on_all_ranks(lambda: SafetensorsWriter(folder, listed, max_file_bytes))
        ranks.on_rank0(writer.create)
        quantiser = Quantiser(source, arch, fp8_block) if fp8_block else None

        def convert() -> None:
            with progress_bar(sum(sizes[i] for i in mine), ranks) as bar:
                for i in mine:
                    if quantiser is not None and weights[i].fp8:
                        _quantise(quantiser, weights[i], dtype, writer)
                        bar.update(sizes[i])
                    else:
                        _convert(source, weights[i], arch, writer, bar.update)

        ranks.on_all_ranks(convert)
        if isinstance(source, Merged):
            source.refuse_other_base(ranks.all_reduce_sum)
        plain = {dtype or source.type_of(name, weight) for weight in weights if not weight.fp32 for name in weight.hf}
        quantization = _quantization(arch, fp8_block) if fp8_block else None
        ranks.on_rank0(lambda: copy_hf_files(found.config, folder, plain, quantization))
    return sum(sizes)


def _open(megatron: Path, config_from: Path | None, base: Path | None) -> tuple[MegatronSource, Architecture, BoxSource]:
    found = find_megatron(megatron, config_from, base)
    arch = read_architecture(found.config, named=found.named)
    return found, arch, found.open(arch)


def _tensors(source: BoxSource, weight: Weight, dtype: torch.dtype | None, fp8_block: int | None) -> list[TensorToWrite]:
    """The tensors to write for a weight: its HF tensors or, with FP8, each of them quantised and its scales."""
    tensors = []
    for name, shape in zip(weight.hf, weight.shapes, strict=True):
        if fp8_block and weight.fp8:
            tensors.append(TensorToWrite(name, FP8, shape))
            tensors.append(TensorToWrite(_scale_name(name), torch.float32, scale_shape(shape, fp8_block)))
        else:
            tensors.append(TensorToWrite(name, weight.type_in(dtype or source.type_of(name, weight)), shape))
    return tensors


def _convert(
    source: BoxSource,
    weight: Weight,
    arch: Architecture,
    writer: SafetensorsWriter,
    written: Callable[[int], Any],
) -> None:
    """Write a weight box by box, as it is stored: a box is copied from file to file if possible, else read and written."""
    for stored in source.boxes(weight, arch):
        copied = writer.copy(stored)
        if copied:
            written(copied)
            continue
        for begin, values in source.blocks(stored):
            written(writer.write(stored.name, begin, values))


def _quantise(quantiser: Quantiser, weight: Weight, dtype: torch.dtype | None, writer: SafetensorsWriter) -> None:
    """Write a weight in FP8, its values rounded to `dtype` first, if that is given."""
    for name in weight.hf:
        for first, values, scales in quantiser.panels(name, weight, dtype):
            writer.write(name, (first, 0), values)
            writer.write(_scale_name(name), (first // quantiser.block, 0), scales)


def _scale_name(name: str) -> str:
    return name + SCALE_SUFFIX


def _quantization(arch: Architecture, block: int) -> dict[str, Any]:
    """quantization_config of config.json. It must name the linear modules that are not quantised, even a tied head."""
    kept = {
        name.removesuffix(".weight")
        for weight in weights_of(arch)
        if not weight.fp8
        for name, shape in zip(weight.hf, weight.shapes, strict=True)
        if len(shape) == 2 and name.endswith(".weight") and weight.megatron != EMBEDDING
    }
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block, block],
        "modules_to_not_convert": sorted(kept | {hf_name(arch.family, HEAD).removesuffix(".weight")}),
    }
