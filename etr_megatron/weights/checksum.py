"""Checksums of tensors that any change of one byte, and any exchange of two parts, changes."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 16
"""Words that are weighted at a time."""


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A signed 64-bit number of a tensor's bytes in order, whatever its dtype and strides; not cryptographic.

    The sum over 64-bit words of word x odd weight, modulo 2**64; the weight depends on the place. One word that differs always
    changes it: an odd number has an inverse.
    """
    data = tensor.contiguous().flatten().view(torch.uint8)
    rest = data.numel() % 8
    words = data[: data.numel() - rest]
    # A view at an odd offset cannot become a view of words.
    words = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64)
    weights = 2 * torch.arange(min(_CHUNK, max(len(words), 1)), device=data.device) + 1
    total = torch.full((), data.numel(), dtype=torch.int64, device=data.device)
    for number, chunk in enumerate(words.split(_CHUNK) if len(words) else ()):
        total += (chunk * weights[: len(chunk)]).sum() * (2 * (number * 2_654_435_761 + 1) + 1)
    if rest:
        tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
        tail[:rest] = data[-rest:]
        total += tail.view(torch.int64)[0] * -7_046_029_254_386_353_131
    return int(total)
