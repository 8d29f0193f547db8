"""A HuggingFace checkpoint with block-quantised weights, read as the bf16 tensors that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.weights.quantize import FP8, scale_shape
from etr_megatron.weights.safetensors_dir import SafetensorsDir

_SCALES = "_scale_inv"


def open_checkpoint(model_dir: str | Path) -> SafetensorsDir:
    """The tensors of a HuggingFace directory, dequantised where its config.json says that they are quantised.

    Raises UserError as `SafetensorsDir` does, and for a quantisation other than FP8 in blocks.
    """
    config = Path(model_dir) / "config.json"
    try:
        quantization = json.loads(config.read_text()).get("quantization_config") if config.is_file() else None
    except ValueError as error:
        raise UserError(f"{config} cannot be read as JSON: {error}") from None
    if not quantization:
        return SafetensorsDir(model_dir)
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or not block or len(set(block)) != 1:
        raise UserError(f"{config}: quant_method {method} with weight_block_size {block} is not read; fp8 in square blocks is")
    return Fp8Dir(model_dir, block[0])


class Fp8Dir(SafetensorsDir):
    """`X` is bf16 where an FP8 `X` and its scales `X_scale_inv` are stored; the scales are no tensors of their own.

    block: rows and columns that have a scale in common. Raises UserError for an FP8 tensor without scales of its shape.
    """

    def __init__(self, model_dir: str | Path, block: int) -> None:
        super().__init__(model_dir)
        self._block = block
        self._quantized = {name for name, stored in self._stored.items() if stored.dtype == FP8}
        for name in sorted(self._quantized):
            scales, wanted = self._stored.get(name + _SCALES), scale_shape(*self._stored[name].shape, block)
            if scales is None or scales.shape != wanted:
                found = "missing" if scales is None else f"of shape {list(scales.shape)}, not {list(wanted)}"
                raise UserError(f"{self.path}: {name} is FP8 and its {name + _SCALES} is {found}; fetch the checkpoint again")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor but scales."""
        scales = {name + _SCALES for name in self._quantized}
        return {name: shape for name, shape in super().shapes().items() if name not in scales}

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a tensor is read."""
        return torch.bfloat16 if name in self._quantized else super().dtype(name)

    def span(self, name: str, begin: tuple[int, ...], size: tuple[int, ...]) -> tuple[Path, int, int] | None:
        """See `SafetensorsDir.span`; None for what is dequantised."""
        return None if name in self._quantized else super().span(name, begin, size)

    def read_into(self, name: str, begin: tuple[int, ...], out: Tensor) -> None:
        """See `SafetensorsDir.read_into`; products with the scales are formed in fp32, as `dequantize_blocks` does."""
        if name not in self._quantized:
            return super().read_into(name, begin, out)
        values = torch.empty(out.shape, dtype=FP8)
        super().read_into(name, begin, values)
        blocks = [torch.arange(b, b + n) // self._block for b, n in zip(begin, out.shape, strict=True)]
        scales = torch.empty(self._stored[name + _SCALES].shape, dtype=self._stored[name + _SCALES].dtype)
        super().read_into(name + _SCALES, (0, 0), scales)
        out.copy_(values.float() * scales.float()[blocks[0]][:, blocks[1]])
        return None
