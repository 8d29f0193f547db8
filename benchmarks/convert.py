"""Time and memory of tools/convert_hf.py on a checkpoint that is several times larger than its memory bound.

    python -m benchmarks.convert                 writes results/convert.json
    python -m benchmarks.convert --layers 4 --rounds 1 --out quick.json

A random bf16 Qwen3 is written to --work (a disk with room for three of it). For each direction, rounds of three contestants in
new processes, one after the other: `cp -r` of the directory that is converted, the same followed by an fsync of every file, and
the conversion, which ends with an fsync as well. Times are whole processes, interpreter and imports included. What a contestant
wrote is removed before the next, and the first round does not count: so all of them find the input in memory and write to
memory that was in use before. The checkpoint should fit into memory twice. Memory is the process's peak resident set as the
kernel reports it, against 2 x the largest tensor + 1 GB.
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
import time
from pathlib import Path
from typing import Any

from benchmarks.experiment_environment import environment

ROOT = Path(__file__).resolve().parents[1]
TOOL = [sys.executable, str(ROOT / "tools" / "convert_hf.py")]
WAYS = ("to_megatron", "to_hf")
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
    """A checkpoint of random weights, in files of 1 GB."""
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


def measure(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a process. This one must be small: Linux counts it before the exec, too."""
    os.sync()  # what was written before is no part of it
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def rounds_of(source: Path, command: list[str], out: Path, rounds: int) -> list[dict[str, tuple[float, int]]]:
    """Rounds of the two copies of `source` and of the conversion; the first, which does not count, is left out."""
    contestants = {
        "cp": ["cp", "-r", str(source), str(out)],
        "cp_fsync": ["bash", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "bash", str(source), str(out)],
        "convert": [*TOOL, *command, "--out", str(out)],
    }
    found = []
    for number in range(rounds + 1):
        one = {}
        for name, arguments in contestants.items():
            one[name] = measure(arguments)
            shutil.rmtree(out)
        found.append(one)
        print(command[0], number or "warm-up", {name: round(seconds, 2) for name, (seconds, _) in one.items()}, flush=True)
    return found[1:]


def check_round_trip(hf: Path, megatron: Path, back: Path) -> None:
    """End the benchmark where there and back is not bit for bit the same."""
    subprocess.run([*TOOL, "to-hf", "--megatron", str(megatron), "--out", str(back), "--max-shard-gb", "1"], check=True)
    for file in hf.glob("*.safetensors"):
        if subprocess.run(["cmp", "-s", file, back / file.name]).returncode:
            raise SystemExit(f"{file.name} is not what it was after the round trip")
    shutil.rmtree(back)


def summary(rounds: list[dict[str, tuple[float, int]]], bound: int) -> dict[str, Any]:
    """Medians, of the ratios to the two copies in the same round too, and memory against the bound."""
    seconds = {name: [one[name][0] for one in rounds] for name in rounds[0]}
    peak = max(one["convert"][1] for one in rounds)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64, help="64 are 7.9 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="directory on the disk that is measured (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "convert.json")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.generate:
        generate(asked.generate, asked.layers)
        return
    with tempfile.TemporaryDirectory(dir=asked.work) as folder:
        hf, megatron, out = (Path(folder) / name for name in ("hf", "megatron", "out"))
        again = [sys.executable, "-m", "benchmarks.convert", "--generate", str(hf), "--layers", str(asked.layers)]
        subprocess.run(again, check=True, cwd=ROOT)
        largest, total = largest_tensor(hf)
        bound = 2 * largest + 10**9
        there = rounds_of(hf, ["to-megatron", "--hf", str(hf)], out, asked.rounds)
        subprocess.run([*TOOL, "to-megatron", "--hf", str(hf), "--out", str(megatron)], check=True)
        check_round_trip(hf, megatron, out)
        shutil.rmtree(hf)
        back = rounds_of(megatron, ["to-hf", "--megatron", str(megatron)], out, asked.rounds)
    found = {
        "environment": environment(ROOT),
        "checkpoint_bytes": total,
        "largest_tensor_bytes": largest,
        "memory_bound_bytes": bound,
        "checkpoint_over_bound": total / bound,
        "to_megatron": summary(there, bound),
        "to_hf": summary(back, bound),
    }
    asked.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({way: {k: found[way][k] for k in ("times_cp", "times_cp_fsync", "peak_resident_bytes")} for way in WAYS}))


if __name__ == "__main__":
    main()
