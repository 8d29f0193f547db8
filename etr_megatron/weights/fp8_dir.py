"""Reads a HuggingFace checkpoint with block-quantised weights as bf16 tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.weights.file_tensor import Index, Span
from etr_megatron.weights.hf_config import is_positive_int, optional_object, read_config
from etr_megatron.weights.quantize import FP8, SCALE_SUFFIX, dequantize_box, scale_shape
from etr_megatron.weights.safetensors_dir import SafetensorsDir

_PANEL = 2**22
"""Number of values read at a time."""


def open_checkpoint(model_dir: str | Path) -> SafetensorsDir:
    """The tensors of a HuggingFace directory, dequantised if its config.json says that they are quantised.

    Raises UserError as `SafetensorsDir` does, and for a quantisation other than FP8 in square blocks.
    """
    source = Path(model_dir) / "config.json"
    quantization = optional_object(read_config(source), "quantization_config", source) if source.is_file() else {}
    if not quantization:
        return SafetensorsDir(model_dir)
    method = quantization.get("quant_method")
    block: Any = quantization.get("weight_block_size")
    square = isinstance(block, list) and len(block) == 2 and is_positive_int(block[0]) and block[0] == block[1]
    if method != "fp8" or not square:
        raise UserError(
            f"{source}: weights quantised with quant_method {method} and weight_block_size {block} cannot be read; only fp8 "
            "with square blocks (two equal positive integers) and weights that are not quantised can"
        )
    return Fp8Dir(model_dir, block[0])


class Fp8Dir(SafetensorsDir):
    """Reads an FP8 tensor `X`, stored with scales `X_scale_inv`, as bf16; the scales are not listed as tensors.

    block: rows and columns that share a scale. Raises UserError for an FP8 tensor that is not a matrix or has no scales of the
    right shape.
    """

    def __init__(self, model_dir: str | Path, block: int) -> None:
        super().__init__(model_dir)
        self.block = block
        self.quantized = frozenset(name for name, stored in self._stored.items() if stored.dtype == FP8)
        for name in sorted(self.quantized):
            shape, scales = self._stored[name].shape, self._stored.get(name + SCALE_SUFFIX)
            if len(shape) != 2:
                raise UserError(f"{self.path}: {name} is FP8 of shape {list(shape)}; only matrices can be FP8")
            wanted = scale_shape(shape, block)
            if scales is None or scales.shape != wanted:
                found = "missing" if scales is None else f"of shape {list(scales.shape)}, not {list(wanted)}"
                raise UserError(
                    f"{self.path}: {name} is FP8 and its {name + SCALE_SUFFIX} is {found}; fetch the checkpoint again"
                )

    def shapes(self) -> dict[str, Index]:
        """Shape of every tensor, scales excepted."""
        scales = {name + SCALE_SUFFIX for name in self.quantized}
        return {name: shape for name, shape in super().shapes().items() if name not in scales}

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a tensor is read."""
        return torch.bfloat16 if name in self.quantized else super().dtype(name)

    def span(self, name: str, begin: Index, size: Index) -> Span | None:
        """See `SafetensorsDir.span`; None for tensors that are dequantised."""
        return None if name in self.quantized else super().span(name, begin, size)

    def read_into(self, name: str, begin: Index, out: Tensor) -> None:
        """See `SafetensorsDir.read_into`; products with the scales are computed in fp32, as in `dequantize_box`."""
        if name not in self.quantized:
            return super().read_into(name, begin, out)
        if not out.numel():
            return None
        (row, col), (rows, cols) = begin, out.shape
        step = max(1, _PANEL // cols)
        for first in range(0, rows, step):
            panel = out[first : first + step]
            values, scales = self.read_quantized(name, (row + first, col), tuple(panel.shape))
            dequantize_box(values, scales, panel, self.block, (row + first, col))
        return None

    def read_quantized(self, name: str, begin: Index, size: Index) -> tuple[Tensor, Tensor]:
        """A non-empty box as stored, in new tensors: (float8_e4m3fn `size`, fp32 scales of the blocks that it touches)."""
        values = torch.empty(size, dtype=FP8)
        super().read_into(name, begin, values)
        first = tuple(at // self.block for at in begin)
        ends = (-(-(at + count) // self.block) for at, count in zip(begin, size, strict=True))
        shape = tuple(end - at for end, at in zip(ends, first, strict=True))
        scales = torch.empty(shape, dtype=self._stored[name + SCALE_SUFFIX].dtype)
        super().read_into(name + SCALE_SUFFIX, first, scales)
        return values, scales.float()
