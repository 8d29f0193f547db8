"""Rules about the layout, by itself and on a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

from etr_megatron.config.defaults import tensor_parallel
from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config


def parallel(config: Config) -> Iterator[Violation]:
    """The layout, whatever the number of ranks."""
    tp = config.parallel.tp
    if tp != "auto" and tp < 1:
        yield Violation(("parallel.tp",), "must be at least 1, or auto")
    if tp == 1 and config.parallel.sequence_parallel:
        yield Violation(
            ("parallel.sequence_parallel", "parallel.tp"),
            "sequence parallelism splits over tensor-parallel ranks and needs tp > 1; set it to false",
        )
    if config.parallel.etp is not None and config.parallel.etp < 1:
        yield Violation(("parallel.etp",), "must be at least 1; null is tp")
    if config.model.path == "tiny" and config.parallel.ep > 1:
        yield Violation(("parallel.ep", "model.path"), "the tiny model has no experts to spread; set ep to 1")


def layout(config: Config, world_size: int) -> Iterator[Violation]:
    """Constraints between the layout and the number of ranks."""
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    tp, pp = tensor_parallel(config.parallel, world_size), config.parallel.pp
    if tp < 1 or pp < 1:
        return  # told by the bounds
    if world_size % (tp * pp):
        yield Violation(
            ("parallel.tp", "parallel.pp"),
            f"world size {world_size} is not divisible by tp x pp = {tp} x {pp} = {tp * pp}; start a multiple of "
            f"{tp * pp} ranks, or set tp and pp so that their product divides {world_size}",
        )
    else:
        yield from _experts_layout(config, world_size // pp, tp)
    if config.parallel.tp == "auto" and tp == 1 and config.parallel.sequence_parallel:
        yield Violation(
            ("parallel.sequence_parallel", "parallel.tp"),
            f"tp is 1 on {world_size} ranks, and sequence parallelism needs tp > 1; start more ranks or set it to false",
        )
    heads = config.tiny.heads
    if config.model.path == "tiny" and heads >= 2 and heads % 2 == 0 and (heads // 2) % tp:
        yield Violation(("tiny.heads", "parallel.tp"), f"the {heads // 2} key/value heads must be divisible by tp = {tp}")


def _experts_layout(config: Config, stage_ranks: int, tp: int) -> Iterator[Violation]:
    """Experts cut the ranks of a pipeline stage anew."""
    ep, etp = config.parallel.ep, tp if config.parallel.etp is None else config.parallel.etp
    if ep >= 1 and etp >= 1 and stage_ranks % (ep * etp):
        yield Violation(
            ("parallel.ep", "parallel.etp"),
            f"the {stage_ranks} ranks of a pipeline stage are not divisible by ep x etp = {ep} x {etp} = {ep * etp} (etp is tp "
            "where it is null); choose ep and etp whose product divides them",
        )
