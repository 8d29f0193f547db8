"""`python -m etr_megatron.observe.reference > docs/metrics.md`: print the reference of metrics.jsonl's keys."""

from __future__ import annotations

import argparse
import inspect
import re
import sys

from etr_megatron.observe.metrics import PASS_RATE_KEYS, ROLLOUT_METRIC_KEYS, MetricsRow, StepMetrics
from etr_megatron.status import code_of_printing

_KEY = re.compile(r"    (\w+): (int|float)(?:  # (.*))?")

_HEAD = """# Metrics

Made by `python -m etr_megatron.observe.reference`; the texts come from `etr_megatron/observe/metrics.py`.

`<run>/metrics.jsonl` has one JSON object per step, which TensorBoard and Weights & Biases show under the same keys (times as
`time/...`). A value that was not finite is `null`.
"""


def render_reference() -> str:
    """Markdown with a table (key, type, meaning) of the keys in every row and one of those that only some rows have."""
    rollout_only = ", ".join(f"`{key}`" for key in ROLLOUT_METRIC_KEYS)
    pass_rate = sorted({re.sub(r"\d+_\d+$", "", key) for key in PASS_RATE_KEYS})
    return "\n".join(
        [
            _HEAD,
            "## In every row\n",
            "Means over tokens are over the step's response tokens, all ranks together. A row of `--rollout-only`, which does",
            "not train, has only these:",
            f"{rollout_only}.\n",
            _table(StepMetrics),
            "## In some rows\n",
            "Of several held-out sets the keys `eval_...` are the mean over sets, and every set has its own as",
            "`eval/<name>/accuracy` and so on. `loss/...` is what a loss reports of itself, a mean over tokens.\n",
            _table(MetricsRow),
            "## By pass rate\n",
            f"{', '.join(f'`{key}LOW_HIGH`' for key in pass_rate)},",
            "with `0_25`, `25_50`, `50_75` and `75_100`: the same over the tokens of groups whose mean reward, as a share of",
            "its range, is from LOW to below HIGH percent, where there are any. Groups without variance are in none.\n",
        ]
    )


def _table(declared: type) -> str:
    """The keys that a class itself declares, with their comments."""
    lines = inspect.getsource(declared).splitlines()
    found = [match.groups(default="") for line in lines if (match := _KEY.fullmatch(line))]
    rows = [f"| `{key}` | `{kind}` | {text.replace('|', chr(92) + '|')} |" for key, kind, text in found]
    return "\n".join(["| key | type | meaning |", "| --- | --- | --- |", *rows, ""])


def main(argv: list[str] | None = None) -> int:
    """Print the reference; returns the exit code. There are no options."""
    argparse.ArgumentParser(prog="python -m etr_megatron.observe.reference", description=__doc__).parse_args(argv)
    print(render_reference(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(code_of_printing(main))
