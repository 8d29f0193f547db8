"""Figures, targets and tables of the rollout benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.rollout_contestants import Shape
from benchmarks.targets import Target, as_json, summary

THROUGHPUT = 0.97
"""Lower bound on the sampler's throughput on a real server, relative to the bare loop's."""

TAIL = 0.1
"""Upper bound on the extra wait of a step with partial rollouts due to long responses, as a share of a long response's time."""


def pair_result(name: str, shape: Shape, wall: Mapping[str, list[float]], cpu: Mapping[str, list[float]]) -> dict[str, Any]:
    """The contestants on one server. wall, cpu: seconds of every step, in the order of the rounds.

    ratio: the sampler's throughput over each other contestant's, as the median of the rounds' ratios, since other load on the
    machine changes from round to round.
    """
    ratios = {
        name: [other / ours for ours, other in zip(wall["sampler"], seconds, strict=True)]
        for name, seconds in wall.items()
        if name != "sampler"
    }
    found: dict[str, Any] = {
        "case": name,
        "requests": shape.requests,
        "response_tokens": shape.tokens,
        "concurrency": shape.concurrency,
        "ratio": {name: statistics.median(each) for name, each in ratios.items()},
        "ratios": ratios,
        "contestants": {
            one: {
                **summary(seconds),
                "tokens_per_s": shape.requests * shape.tokens / statistics.median(seconds),
                "cpu_us_per_request": statistics.median(cpu[one]) / shape.requests * 1e6,
            }
            for one, seconds in wall.items()
        },
    }
    # The server without a model only shows the client's cost, not a run's throughput: no target there.
    targets = (
        [Target("bare_loop's throughput / sampler's", 1 / found["ratio"]["bare_loop"], 1 / THROUGHPUT)]
        if "SGLang" in name
        else []
    )
    return {**found, "targets": as_json(targets)}


def pair_table(found: Mapping[str, Any]) -> str:
    """A comparison as text."""
    size = f"{found['requests']} requests of {found['response_tokens']} tokens, {found['concurrency']} at once"
    lines = [f"{found['case']}: {size}", f"  {'':<18}{'median s':>10}{'min s':>10}{'tokens/s':>10}{'CPU us/request':>16}"]
    for name, one in found["contestants"].items():
        times = f"{one['median_s']:>10.3f}{one['min_s']:>10.3f}"
        lines.append(f"  {name:<18}{times}{one['tokens_per_s']:>10,.0f}{one['cpu_us_per_request']:>16,.0f}")
    for name, ratio in found["ratio"].items():
        lines.append(f"  the sampler's throughput is {ratio:.3f} of {name}'s (median of the rounds' ratios)")
    for target in found["targets"]:
        lines.append(f"  {'met' if target['met'] else 'missed'}: at least {1 / target['limit']:.2f}")
    return "\n".join(lines)


def tail_result(
    waits: Mapping[str, Mapping[str, list[float]]], *, ordinary_s: float, share: float, factor: float
) -> dict[str, Any]:
    """Waits of steps, by setting: seconds until the groups are complete plus those that the weight sync has to wait."""
    long_s = factor * ordinary_s
    steps = {name: [a + b for a, b in zip(one["groups_s"], one["sync_s"], strict=True)] for name, one in waits.items()}
    found = {name: {**summary(seconds), "mean_s": statistics.mean(seconds), **waits[name]} for name, seconds in steps.items()}
    more = found["partial"]["mean_s"] - found["partial, no tail"]["mean_s"]
    target = Target("share of a long response that a step waits more for with partial rollouts", more / long_s, TAIL)
    return {"ordinary_s": ordinary_s, "long_s": long_s, "share": share, "settings": found, "targets": as_json([target])}


def tail_table(found: Mapping[str, Any]) -> str:
    """The waits as text."""
    long = f"{found['share']:.0%} of the responses take {found['long_s']:g} s"
    lines = [f"a step's waits; {long}, the others {found['ordinary_s']:g} s", f"  {'':<26}{'mean s':>10}{'median s':>10}"]
    for name, one in found["settings"].items():
        lines.append(f"  {name:<26}{one['mean_s']:>10.3f}{one['median_s']:>10.3f}")
    for target in found["targets"]:
        verdict = "met" if target["met"] else "missed"
        lines.append(f"  {verdict}: {target['text']} = {target['value']:.3f} (target <= {target['limit']:g})")
    return "\n".join(lines)
