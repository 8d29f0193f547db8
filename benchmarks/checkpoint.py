"""Checkpoints of the distributed optimizer: seconds and memory of a save and a load, against Megatron's formats, on CPU.

    python -m benchmarks.checkpoint            # 57M parameters on 2 ranks; needs an otherwise idle machine
    python -m benchmarks.checkpoint --quick    # a tiny model, whose figures mean nothing

Contestants:

- `by_rank`: ours.
- `megatron`: Megatron's format that other layouts can read (`fully_reshardable`), which gathers the state on every
  data-parallel rank.
- `megatron_mem_efficient`: the same, but gathered on the first rank only.
- `asynchronous`: ours with `checkpoint.asynchronous`, which returns after a copy.

All use the same writer and reader, and store the weights in the same way. Contestants run round robin, each in fresh processes:
one save and one load are timed. Each figure is the largest of any rank: seconds for which a save stops the run; seconds until
it is complete, in which the whole state is also overwritten once, as by training; seconds of the load; the peak of resident
memory beyond what was resident before; and the bytes read according to the kernel. After the load, the state is compared with
what was saved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import fresh_ranks
from benchmarks.experiment_environment import environment
from benchmarks.output import code_of_stoppable, prepare_output
from etr_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONTESTANTS = ("by_rank", "megatron", "megatron_mem_efficient", "asynchronous")
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 32_000}
TINY = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 301}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 if an option is wrong. Raises `UserError` for values that do not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, 1 round")
    parser.add_argument("--rounds", type=int, help="saves and loads of each contestant (default 5, quick 1)")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks (2)")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="some of them, by_rank among them (all)")
    parser.add_argument("--output", type=Path, help="JSON (default benchmarks/results/checkpoint[_quick].json)")
    options = parser.parse_args(argv)
    options.rounds = options.rounds if options.rounds is not None else 1 if options.quick else 5
    options.output = options.output or RESULTS / ("checkpoint_quick.json" if options.quick else "checkpoint.json")
    for name in ("rounds", "ranks"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    options.contestants = options.contestants.split(",")
    if "by_rank" not in options.contestants or not set(CONTESTANTS).issuperset(options.contestants):
        raise UserError(f"--contestants must be some of {', '.join(CONTESTANTS)}, and by_rank, with which they are compared")
    prepare_output(options.output)
    return options


def run_ranks(contestant: str, model: Path, ranks: int) -> dict[str, float]:
    """Save and load in fresh ranks; the largest figure of any rank. Raises RuntimeError if a rank fails."""
    with tempfile.TemporaryDirectory(prefix="checkpoint", dir=model.parent) as folder:
        job = {"contestant": contestant, "model": str(model), "folder": folder}
        found = fresh_ranks.run_ranks("benchmarks.checkpoint_rank", job, ranks, contestant)
    return {key: max(rank[key] for rank in found) for key in found[0]}


def write_model(path: Path, sizes: dict[str, int]) -> int:
    """Write a random Qwen3 in HuggingFace format; returns its number of parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": sizes["hidden_size"] // 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=False))
    model.save_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters())


def medians(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Median of each figure, by contestant."""
    return {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in rounds.items() if found
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """Medians as text, and the ratios of ours to the others."""
    lines = [f"{'':<24}{'stop s':>10}{'save s':>10}{'MiB':>10}{'load s':>10}{'MiB':>10}{'read MiB':>10}"]
    columns = ("stop_s", "save_s", "save_peak_bytes", "load_s", "load_peak_bytes", "load_read_bytes")
    for name, one in found.items():
        cells = [f"{one[key]:>10.2f}" if key.endswith("_s") else f"{one[key] / 2**20:>10.0f}" for key in columns]
        lines.append(f"{name:<24}{''.join(cells)}")
    for name in (one for one in found if one != "by_rank"):
        ratios = ", ".join(f"{key} {found['by_rank'][key] / found[name][key]:.2f}" for key in columns)
        lines.append(f"by_rank / {name}: {ratios}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 0, or 2 if an option is wrong."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    result: dict[str, Any] = {"environment": environment(ROOT), "ranks": options.ranks}
    with tempfile.TemporaryDirectory(prefix="checkpoint") as folder:
        model = Path(folder) / "model"
        result["parameters"] = write_model(model, TINY if options.quick else WIDE)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in options.contestants}
        for number in range(options.rounds):
            for place in range(len(rounds)):
                name = options.contestants[(number + place) % len(rounds)]
                rounds[name].append(run_ranks(name, model, options.ranks))
    result.update(rounds=rounds, medians=medians(rounds))
    print(table(result["medians"]))
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
