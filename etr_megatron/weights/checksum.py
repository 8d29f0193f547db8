"""Checksums of tensors: a change of one word always changes them, other changes do except with a chance of about 2**-64."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 16
"""Words hashed at a time."""


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A signed 64-bit number of a tensor's bytes in order, whatever its dtype and strides; not cryptographic.

    The sum, modulo 2**64, of a hash of each 64-bit word and its position. The hash is invertible, so one word that differs
    always changes the sum. It is not linear (the finaliser of MurmurHash3), so two changes do not cancel, as two flipped signs
    would if words were only multiplied by their positions.
    """
    data = tensor.contiguous().flatten().view(torch.uint8)
    rest = data.numel() % 8
    words = data[: data.numel() - rest]
    # A view at an unaligned offset cannot become a view of words.
    words = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64)
    total = torch.full((), data.numel(), dtype=torch.int64, device=data.device)
    for number, chunk in enumerate(words.split(_CHUNK) if len(words) else ()):
        total += _scrambled(chunk, number * _CHUNK).sum()
    if rest:
        tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
        tail[:rest] = data[-rest:]
        total += _scrambled(tail.view(torch.int64), len(words)).sum()
    return int(total)


def _scrambled(words: Tensor, first: int) -> Tensor:
    """Hash of the value and the position of each word, int64 [n]; the first word is at position `first`."""
    places = torch.arange(first + 1, first + 1 + len(words), device=words.device)
    mixed = words + places * -7_046_029_254_386_353_131
    for factor in (-49_064_778_989_728_563, -4_265_267_296_055_464_877):
        mixed = (mixed ^ _upper(mixed)) * factor
    return mixed ^ _upper(mixed)


def _upper(words: Tensor) -> Tensor:
    """The upper 31 bits, by a logical shift. (An arithmetic shift, `>>` of a signed number, fills in copies of the sign; then a
    word and its complement would have the same hash.)"""
    return (words >> 33) & 0x7FFF_FFFF
