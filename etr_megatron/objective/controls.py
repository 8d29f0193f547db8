"""Controls for claims about elastic ranges: the same budget without its allocation.

`matched`: every sample gets ETR's mean radius of the batch. `shuffled`: ETR's radii, permuted over samples. Both use only
samples with nonzero advantage: the others are never clipped, and their radii would only shift the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def control_radii(
    low: Tensor, high: Tensor, *, how: str, advantage: Tensor, tokens: Sequence[int], seed: int
) -> tuple[Tensor, Tensor]:
    """The radii [N] with which the control `how` (`none`, `matched`, `shuffled`) replaces ETR's `low` and `high` [N].

    advantage: [N]. tokens: loss rows of each sample; they weight the mean, since clipping acts on tokens. seed: for the
    permutation. Raises ValueError for an unknown name.
    """
    if how == "none":
        return low, high
    active = (advantage != 0).nonzero()[:, 0]
    if how == "matched":
        weights = torch.tensor(list(tokens), dtype=low.dtype)[active]
        if not bool(weights.sum() > 0):
            return low, high
        even_low, even_high = (torch.full_like(r, (r[active] @ weights / weights.sum()).item()) for r in (low, high))
        return even_low, even_high
    if how == "shuffled":
        dealt = active[torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))]
        return low.index_copy(0, active, low[dealt]), high.index_copy(0, active, high[dealt])
    raise ValueError(f"objective.control is {how!r}; known: none, matched, shuffled")
