"""Rules about the optimisation."""

from __future__ import annotations

from collections.abc import Iterator

from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config


def train(config: Config) -> Iterator[Violation]:
    """The optimisation."""
    train = config.train
    if train.head_chunk_rows is not None and train.head_chunk_rows < 1:
        yield Violation(("train.head_chunk_rows",), "must be at least 1; null chooses by device")
    if train.min_lr > train.lr:
        yield Violation(("train.min_lr", "train.lr"), "min_lr must not exceed lr")
    if min(train.minibatches, train.epochs, config.run.steps) >= 1:
        updates = config.run.steps * train.epochs * train.minibatches
        if train.lr_warmup_updates >= updates:
            yield Violation(
                ("train.lr_warmup_updates", "run.steps", "train.epochs", "train.minibatches"),
                f"the warm-up must end before the run does, which has {updates} optimizer steps",
            )
