"""Time and memory of tools/convert_hf.py on a checkpoint several times larger than its memory bound.

    python -m benchmarks.convert                 writes results/convert.json
    python -m benchmarks.convert --layers 4 --rounds 1 --output quick.json

A random bf16 Qwen3 is written to --work, which needs disk space for four copies of it. Conversions are measured in both
directions, by one process or two, with values kept, cast to fp32 or quantised to FP8. Each round runs three contestants one
after the other in new processes: `cp -r` of the input directory (twice if the output is twice as large), the same followed by
an fsync of every file, and the conversion, which also ends with an fsync. Times are of whole processes, including interpreter
start and imports. The output of a contestant is removed before the next one runs, and the first round does not count. So every
contestant finds the input in the page cache and writes to memory that has been used before. The checkpoint should fit into
memory twice. Memory is the peak resident set of the largest process as the kernel reports it, against 2 x the largest
tensor + 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiment_environment import environment
from benchmarks.output import code_of_stoppable, prepare_output
from benchmarks.process_cost import Cost, cost_of
from etr_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TOOL = str(ROOT / "tools" / "convert_hf.py")


@dataclass(frozen=True)
class Way:
    """A conversion of the directory `source`: hf, megatron or fp8. copies: number of copies of `source` that the `cp`
    contestants make, to write as many bytes as the conversion."""

    source: str
    options: tuple[str, ...] = ()
    processes: int = 1
    copies: int = 1

    def command(self, folder: Path, out: Path) -> list[str]:
        """Command that converts `folder / source`."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)] if self.processes > 1 else []
        way = ["to-hf", "--megatron"] if self.source == "megatron" else ["to-megatron", "--hf"]
        return [sys.executable, *launcher, TOOL, *way, str(folder / self.source), *self.options, "--out", str(out)]


WAYS = {
    "to_megatron": Way("hf"),
    "to_megatron_2_processes": Way("hf", processes=2),
    "to_hf": Way("megatron"),
    "to_hf_2_processes": Way("megatron", processes=2),
    "to_hf_fp8": Way("megatron", ("--fp8-block", "128")),
    "to_hf_fp32": Way("megatron", ("--dtype", "fp32"), copies=2),
    "fp8_to_megatron": Way("fp8", copies=2),
}
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 16384,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def generate(folder: Path, layers: int) -> None:
    """Write a checkpoint of random weights, in files of 1 GB."""
    import torch

    from etr_megatron.convert.safetensors_writer import SafetensorsWriter, TensorToWrite
    from etr_megatron.weights import read_architecture, weights_of

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    shapes = {n: s for w in weights_of(read_architecture(folder)) for n, s in zip(w.hf, w.shapes, strict=True)}
    writer = SafetensorsWriter(folder, [TensorToWrite(name, torch.bfloat16, shape) for name, shape in shapes.items()], 10**9)
    writer.create()
    torch.manual_seed(1)
    values = torch.randn(2**25 + 4096).to(torch.bfloat16)
    for number, (name, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        writer.write(name, (0,) * len(shape), values[number % 4096 :][:count].view(shape))


def largest_tensor(folder: Path) -> tuple[int, int]:
    """(bytes of the largest tensor, bytes of all tensors) of a HuggingFace directory, from the files' headers."""
    sizes = []
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        sizes += [entry["data_offsets"][1] - entry["data_offsets"][0] for n, entry in header.items() if n != "__metadata__"]
    return max(sizes), sum(sizes)


def rounds_of(name: str, folder: Path, rounds: int) -> list[dict[str, Cost]]:
    """Rounds of both copies and the conversion, without the first, which does not count."""
    way, out = WAYS[name], folder / "out"
    copy = 'mkdir "$2" && for ((i = 0; i < $3; i++)); do cp -r "$1" "$2/$i" || exit 1; done'
    arguments = ["bash", str(folder / way.source), str(out), str(way.copies)]
    contestants = {
        "cp": ["bash", "-c", copy, *arguments],
        "cp_fsync": ["bash", "-c", f'{copy} && sync "$2"/*/*', *arguments],
        "convert": way.command(folder, out),
    }
    found = []
    for number in range(rounds + 1):
        one = {}
        for contestant, command in contestants.items():
            os.sync()  # do not time earlier writes
            one[contestant] = cost_of(command)
            shutil.rmtree(out)
        found.append(one)
        print(name, number or "warm-up", {each: round(cost.seconds, 2) for each, cost in one.items()}, flush=True)
    return found[1:]


def check_round_trip(folder: Path) -> None:
    """Exit if the round trip does not reproduce the checkpoint bit for bit."""
    back = folder / "back"
    command = [*WAYS["to_hf"].command(folder, back), "--max-shard-gb", "1"]
    subprocess.run(command, check=True)
    for file in (folder / "hf").glob("*.safetensors"):
        if subprocess.run(["cmp", "-s", file, back / file.name]).returncode:
            raise SystemExit(f"{file.name} is not what it was after the round trip")
    shutil.rmtree(back)


def summary(rounds: list[dict[str, Cost]], bound: int) -> dict[str, Any]:
    """Medians, also of the ratios to both copies within a round, and memory against the bound."""
    seconds = {name: [one[name].seconds for one in rounds] for name in rounds[0]}
    peak = max(one["convert"].peak_resident_bytes for one in rounds)
    ratios = {
        name: [ours / other for ours, other in zip(seconds["convert"], seconds[name], strict=True)]
        for name in ("cp", "cp_fsync")
    }
    return {
        "seconds": seconds,
        "median_seconds": {name: statistics.median(some) for name, some in seconds.items()},
        "ratios": ratios,
        "times_cp": statistics.median(ratios["cp"]),
        "times_cp_fsync": statistics.median(ratios["cp_fsync"]),
        "peak_resident_bytes": peak,
        "memory_within_bound": peak <= bound,
    }


def measure_all(folder: Path, rounds: int, ways: Sequence[str]) -> dict[str, Any]:
    """The result's entries by conversion, from the checkpoint `folder / hf`."""
    largest, total = largest_tensor(folder / "hf")
    bound = 2 * largest + 10**9
    subprocess.run(WAYS["to_megatron"].command(folder, folder / "megatron"), check=True)
    check_round_trip(folder)
    subprocess.run(WAYS["to_hf_fp8"].command(folder, folder / "fp8"), check=True)
    sizes = dict(checkpoint_bytes=total, largest_tensor_bytes=largest, memory_bound_bytes=bound)
    return sizes | {name: summary(rounds_of(name, folder, rounds), bound) for name in ways}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64, help="64 are 7.9 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--work", type=Path, help="directory on the disk that is measured (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "convert.json")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    for name in ("layers", "rounds"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name} is {getattr(asked, name)}; it must be at least 1")
    if asked.work is not None and not asked.work.is_dir():
        raise UserError(f"--work {asked.work} is no directory")
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code, 2 if an option is wrong."""
    try:
        asked = parse(sys.argv[1:] if argv is None else argv)
        if asked.generate:
            generate(asked.generate, asked.layers)
            return 0
        prepare_output(asked.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=asked.work) as folder:
        again = [sys.executable, "-m", "benchmarks.convert", "--generate", f"{folder}/hf", "--layers", str(asked.layers)]
        subprocess.run(again, check=True, cwd=ROOT)
        measured = measure_all(Path(folder), asked.rounds, asked.ways)
    found = {"environment": environment(ROOT), **measured}
    asked.output.write_text(json.dumps(found, indent=2) + "\n")
    shown = ("times_cp", "times_cp_fsync", "peak_resident_bytes")
    print(json.dumps({way: {key: found[way][key] for key in shown} for way in asked.ways}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
