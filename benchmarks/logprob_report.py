"""Figures, targets and the table of the log-prob benchmark, from the ranks' measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.targets import Target, as_json

GEMMS_RATIO = 1.25
"""Upper bound on the time of `single_pass` in fp32, relative to the bare products."""

MEMORY_RATIO = 0.3
"""Upper bound on the peak memory of `single_pass`, relative to `megatron_core`."""


def gemms_seconds(contestants: dict[str, Any]) -> float:
    """The floor: the fastest variant of the bare products."""
    return min(contestants[name]["median_s"] for name in ("gemms", "gemms_chunked", "gemms_ours"))


def targets(case: dict[str, Any]) -> list[Target]:
    """The targets that apply to a case: all in fp32; in bf16 only that it beats `shard_softmax`, as torch on CPU has no product
    of bf16 operands with an fp32 result."""
    contestants = case["contestants"]
    ours = contestants["single_pass"]

    def ratio(name: str, key: str = "median_s") -> float:
        return ours[key] / contestants[name][key]

    found = [Target("time / shard_softmax", ratio("shard_softmax"), 1.0)]
    if case["dtype"] == "float32":
        found += [
            Target("time / gemms", ours["median_s"] / gemms_seconds(contestants), GEMMS_RATIO),
            Target("time / megatron_core", ratio("megatron_core"), 1.0),
            Target("memory / megatron_core", ratio("megatron_core", "peak_bytes"), MEMORY_RATIO),
        ]
    return found


def targets_as_json(case: dict[str, Any]) -> list[dict[str, Any]]:
    """`targets` for the result file."""
    return as_json(targets(case))


def table(case: dict[str, Any]) -> str:
    """A case as text, fastest first."""
    floor = gemms_seconds(case["contestants"])
    lines = [
        f"TP{case['tp']} {case['dtype']} T={case['rows']} H={case['hidden']} V={case['vocab']}",
        f"  {'':<14}{'median s':>10}{'min s':>10}{'spread s':>10}{'x gemms':>9}{'peak MiB':>10}  largest error",
    ]
    for name, one in sorted(case["contestants"].items(), key=lambda item: item[1]["median_s"]):
        error = f"{max(one['errors'].values()):.1e}" if one["errors"] else "-"
        lines.append(
            f"  {name:<14}{one['median_s']:>10.4f}{one['min_s']:>10.4f}{one['spread_s']:>10.4f}{one['median_s'] / floor:>9.2f}"
            f"{one['peak_bytes'] / 2**20:>10.1f}  {error}"
        )
    lines.append(f"  single_pass_bytes says {case['single_pass_formula_bytes'] / 2**20:.1f} MiB")
    for target in targets(case):
        verdict = "met" if target.met else "missed"
        lines.append(f"  {verdict}: single_pass {target.text} = {target.value:.2f} (target <= {target.limit:g})")
    return "\n".join(lines)
