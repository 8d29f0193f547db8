"""Progress of a conversion, on a terminal."""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm

from etr_megatron.convert.ranks import Ranks


def progress_bar(total: int, ranks: Ranks) -> tqdm[NoReturn]:
    """A bar over `total` bytes, this rank's share, with bytes per second; shown by rank 0 if stderr is a terminal."""
    what = f"rank 0 of {ranks.world}" if ranks.world > 1 else "converting"
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=True if ranks.rank else None, dynamic_ncols=True)
