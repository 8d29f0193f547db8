"""Aggregation weights of token losses, with one denominator for the whole optimizer step."""

from __future__ import annotations

from collections.abc import Sequence


def token_weights(lengths: Sequence[int], how: str, constant_length: int | None = None) -> list[float]:
    """Weight of every token of sample i in `loss = sum_tokens weight_i * token_loss`.

    lengths: loss rows of ALL samples of the optimizer step (all microbatches, all data-parallel ranks). The denominator is
    global, so the loss does not depend on how the samples are split, and must not be divided again.

    how: `token_mean` 1 / sum(lengths) (DAPO); `sequence_mean` 1 / (N * length_i) (GRPO); `constant_length`
    1 / (N * constant_length) (Dr. GRPO). Raises ValueError for another name or a missing constant.
    """
    if how == "token_mean":
        total = sum(lengths)
        return [1 / total if total else 0.0] * len(lengths)
    if how == "sequence_mean":
        return [1 / (len(lengths) * length) if length else 0.0 for length in lengths]
    if how == "constant_length":
        if not constant_length:
            raise ValueError("aggregation constant_length needs objective.constant_length")
        return [1 / (len(lengths) * constant_length)] * len(lengths)
    raise ValueError(f"objective.aggregation is {how!r}; known: token_mean, sequence_mean, constant_length")
