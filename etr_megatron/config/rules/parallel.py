"""Rules about the parallel layout, by itself and for a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

from etr_megatron.config.defaults import tensor_parallel
from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config


def parallel(config: Config) -> Iterator[Violation]:
    """The layout, independent of the number of ranks."""
    tp = config.parallel.tp
    if tp != "auto" and tp < 1:
        yield Violation(("parallel.tp",), "must be at least 1, or auto")
    if tp == 1 and config.parallel.sequence_parallel:
        yield Violation(
            ("parallel.sequence_parallel", "parallel.tp"),
            "sequence parallelism splits activations over tensor-parallel ranks and needs tp > 1; set sequence_parallel to "
            "false",
        )
    yield from _stages(config)
    if config.parallel.etp is not None and config.parallel.etp < 1:
        yield Violation(("parallel.etp",), "must be at least 1, or null for tp")
    if config.model.path == "tiny" and config.parallel.ep > 1:
        yield Violation(("parallel.ep", "model.path"), "the tiny model has no experts to spread; set ep to 1")


def _stages(config: Config) -> Iterator[Violation]:
    """Settings that only apply to several pipeline stages."""
    parallel = config.parallel
    if parallel.vpp > 1 and parallel.pp == 1:
        yield Violation(
            ("parallel.vpp", "parallel.pp"), "model chunks interleave pipeline stages and need pp > 1; set vpp to 1"
        )
    for name in ("first_stage_layers", "last_stage_layers"):
        count = getattr(parallel, name)
        if count is not None and count < 1:
            yield Violation((f"parallel.{name}",), "must be at least 1, or null for an even share")
        elif count is not None and parallel.pp == 1:
            yield Violation((f"parallel.{name}", "parallel.pp"), f"the only pipeline stage has all layers; set {name} to null")


def layout(config: Config, world_size: int) -> Iterator[Violation]:
    """Constraints between the layout and the number of ranks."""
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    tp, pp, cp = tensor_parallel(config.parallel, world_size), config.parallel.pp, config.parallel.cp
    if tp < 1 or pp < 1 or cp < 1:
        return  # reported by the rules for single values
    if world_size % (tp * pp * cp):
        sizes = {"tp": tp, "pp": pp, **({"cp": cp} if cp > 1 else {})}
        yield Violation(
            tuple(f"parallel.{name}" for name in sizes),
            f"world size {world_size} is not divisible by {' x '.join(sizes)} = {' x '.join(map(str, sizes.values()))} = "
            f"{tp * pp * cp}; start a multiple of {tp * pp * cp} ranks, or set {', '.join(list(sizes)[:-1])} and "
            f"{list(sizes)[-1]} so that their product divides {world_size}",
        )
    else:
        yield from _experts_layout(config, world_size // pp, tp)
    if config.parallel.tp == "auto" and tp == 1 and config.parallel.sequence_parallel:
        yield Violation(
            ("parallel.sequence_parallel", "parallel.tp"),
            f"tp is 1 on {world_size} ranks, and sequence parallelism needs tp > 1; start more ranks, or set "
            "sequence_parallel to false",
        )
    heads, kv_heads = config.tiny.heads, config.tiny.heads // 2
    if config.model.path == "tiny" and heads >= 2 and heads % 2 == 0 and (heads % tp or (kv_heads % tp and tp % kv_heads)):
        yield Violation(
            ("tiny.heads", "parallel.tp"),
            f"tp = {tp} must divide the {heads} attention heads, and be a divisor or a multiple of the {kv_heads} key/value "
            "heads",
            given=("model.path",),
        )


def _experts_layout(config: Config, stage_ranks: int, tp: int) -> Iterator[Violation]:
    """EP x ETP must divide the ranks of a pipeline stage."""
    ep, etp = config.parallel.ep, tp if config.parallel.etp is None else config.parallel.etp
    if ep >= 1 and etp >= 1 and stage_ranks % (ep * etp):
        yield Violation(
            ("parallel.ep", "parallel.etp"),
            f"the {stage_ranks} ranks of a pipeline stage are not divisible by ep x etp = {ep} x {etp} = {ep * etp} (a null "
            f"etp is tp); choose ep and etp so that their product divides {stage_ranks}",
        )
