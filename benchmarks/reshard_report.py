"""Figures, targets and the table of the resharding benchmark, from the ranks' measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.targets import Target, as_json, summary

LIMITS = {"megatron_core": 0.75, "gather_broadcast": 0.4, "bare_copy": 2.0}
"""Upper bound on the time of `sharded`, relative to each."""

PLANNING_LIMITS = {"small": 0.2, "70B": 5.0}
"""Seconds."""


def case_result(name: str, bound: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """A case's entry in the result file. bound: the least bytes that must be sent."""
    contestants = {}
    for contestant, seconds in ranks[0]["seconds"].items():
        sent = sum(rank["bytes"][contestant] for rank in ranks)
        contestants[contestant] = {
            **summary(seconds),
            "first_s": max(rank["first_s"][contestant] for rank in ranks),
            # megatron-core does not count its bytes.
            "bytes_over_bound": sent / bound if bound and contestant != "megatron_core" else None,
        }
    result = {"case": name, "bound_bytes": bound, "contestants": contestants}
    return {**result, "targets": as_json(targets(result))}


def targets(result: dict[str, Any]) -> list[Target]:
    """The targets that apply to a case."""
    contestants = result["contestants"]
    ours = contestants["sharded"]
    found = []
    if ours["bytes_over_bound"] is not None:
        found.append(Target("bytes / lower bound", ours["bytes_over_bound"], 1.0))
    for name, limit in LIMITS.items():
        if name in contestants:
            found.append(Target(f"time / {name}", ours["median_s"] / contestants[name]["median_s"], limit))
    return found


def table(result: dict[str, Any]) -> str:
    """A case as text, fastest first."""
    lines = [
        f"{result['case']}: at least {result['bound_bytes'] / 2**20:.1f} MiB to send",
        f"  {'':<18}{'median s':>10}{'min s':>10}{'spread s':>10}{'first s':>10}{'bytes':>8}",
    ]
    for name, one in sorted(result["contestants"].items(), key=lambda item: item[1]["median_s"]):
        factor = "-" if one["bytes_over_bound"] is None else f"{one['bytes_over_bound']:.3f}"
        times = "".join(f"{one[key]:>10.4f}" for key in ("median_s", "min_s", "spread_s", "first_s"))
        lines.append(f"  {name:<18}{times}{factor:>8}")
    for target in targets(result):
        verdict = "met" if target.met else "missed"
        lines.append(f"  {verdict}: sharded {target.text} = {target.value:.3f} (target <= {target.limit:g})")
    return "\n".join(lines)
