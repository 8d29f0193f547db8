"""Seconds of a weight sync into a real SGLang server on CPU, by each method that sends whole tensors.

    bash tools/setup_env.sh --sglang && python -m benchmarks.weight_sync    # 0.4 GB in fp32
    python -m benchmarks.weight_sync --quick                                # 1 MB, whose times mean nothing

Contestants:

- `shared_memory`: `sglang.sync: tensor` into a server on this machine.
- `text`: the same into a server that cannot use shared memory, as base64 in JSON.
- `broadcast`: over gloo.
- `bare_copy`: only copies the buckets in this process's memory.

All but `bare_copy` use the same flat buckets and the same transaction (pause, begin, weights, end, flush, version, continue),
round robin after a warm-up of each. Before anything is timed, each contestant sends the weights, with zeros sent in between,
and the server returns log-probs after each: they must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from benchmarks.experiment_environment import environment
from benchmarks.output import code_of_stoppable, prepare_output
from benchmarks.rollout import CONFIG, real_server, tokenizer_of
from benchmarks.targets import summary
from etr_megatron.config import Config, load_config
from etr_megatron.data.warm_start import new_model
from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.client import ServerClient
from etr_megatron.rollout.sglang.connections import Connections
from etr_megatron.rollout.sglang.delivery import BroadcastDelivery, Bucket, Delivery, TensorDelivery
from etr_megatron.rollout.sglang.fleet import Fleet
from etr_megatron.rollout.sglang.shared_memory import SharedBuckets
from etr_megatron.rollout.sglang.sync import Transaction
from etr_megatron.weights import Architecture, read_architecture, weights_of
from etr_megatron.weights.transport.whole import weight_groups

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LARGE = ["tiny.hidden_size=768", "tiny.layers=12", "tiny.heads=12", "tiny.head_dim=64", "tiny.intermediate_size=3072"]
TIMEOUT_S = 300.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 if an option is wrong. Raises `UserError` for values that do not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_sync", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, 2 rounds")
    parser.add_argument("--rounds", type=int, help="timed syncs of each contestant (default 5, quick 2)")
    parser.add_argument("--bucket-mib", type=int, help="size of a bucket (default that of sglang.bucket_mib, one bucket)")
    parser.add_argument("--output", type=Path, help="JSON (default benchmarks/results/weight_sync.json or ..._quick.json)")
    options = parser.parse_args(argv)
    options.rounds = options.rounds if options.rounds is not None else 2 if options.quick else 5
    options.output = options.output or RESULTS / ("weight_sync_quick.json" if options.quick else "weight_sync.json")
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; it must be at least 1")
    prepare_output(options.output)
    return options


def buckets_of(arch: Architecture, tensors: dict[str, Tensor], limit: int) -> Iterator[Bucket]:
    """Buckets as in a sync: weights in order, in flat buckets of at most `limit` bytes, or of one weight that is larger."""
    for group in weight_groups(weights_of(arch), torch.float32, None, limit):
        flat = torch.empty(group.nbytes, dtype=torch.uint8)
        for field in group.tensors:
            field.view(flat).copy_(tensors[field.name])
        yield Bucket(group.tensors, flat)


class SharedDelivery(TensorDelivery):
    """Does what `NodeBuckets` does on rank 0 for the servers of its machine, and sends the requests."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet, workers=1, timeout_s=TIMEOUT_S)
        self._names, self._shared = [client.name for client in fleet.clients], SharedBuckets(workers=1)

    async def deliver(self, bucket: Bucket) -> None:
        """See `Delivery.deliver`."""
        await super().deliver(replace(bucket, handles=self._shared.put(bucket.fields, bucket.flat, self._names)))


def deliveries(fleet: Fleet) -> dict[str, Delivery]:
    """The contestants' deliveries by name."""
    return {
        "shared_memory": SharedDelivery(fleet),
        "text": TensorDelivery(fleet, workers=1, timeout_s=TIMEOUT_S),
        "broadcast": BroadcastDelivery(fleet, workers=1, host="127.0.0.1", backend="gloo", timeout_s=TIMEOUT_S),
    }


class Syncs:
    """Weight syncs into one server, each with a new version."""

    def __init__(self, fleet: Fleet, ways: dict[str, Delivery]) -> None:
        self._fleet, self._ways, self._version = fleet, ways, 0

    async def run(self, way: str, buckets: Sequence[Bucket]) -> float:
        """Seconds of one sync. Raises EngineGoneError if the server fails."""
        transaction, self._version = Transaction(self._fleet, TIMEOUT_S), self._version + 1
        started = time.perf_counter()
        await transaction.begin()
        for bucket in buckets:
            await self._ways[way].deliver(bucket)
        await transaction.finish(self._version)
        return time.perf_counter() - started

    async def logprobs(self) -> list[float]:
        """Log-probs of a greedy response."""
        sampling = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
        body = {"input_ids": [5, 6, 7, 8], "sampling_params": sampling, "return_logprob": True}
        reply = await self._fleet.clients[0].call("/generate", body, timeout_s=TIMEOUT_S)
        return [row[0] for row in reply["meta_info"]["output_token_logprobs"]]


async def measure(url: str, buckets: Sequence[Bucket], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant's syncs. Raises RuntimeError if a contestant does not deliver the weights."""
    zeros = [Bucket(bucket.fields, torch.zeros_like(bucket.flat)) for bucket in buckets]
    async with httpx.AsyncClient(transport=Connections()) as http:
        client = ServerClient("server", url, http)
        await client.learn_routes((), timeout_s=TIMEOUT_S)
        fleet = Fleet([client], timeout_s=TIMEOUT_S, hang_timeout_s=TIMEOUT_S)
        ways = deliveries(fleet)
        syncs, wanted = Syncs(fleet, ways), None
        for way in ways:
            await syncs.run(way, zeros)
            without = await syncs.logprobs()
            await syncs.run(way, buckets)
            found = await syncs.logprobs()
            wanted = wanted or found
            if found != wanted or found == without:
                raise RuntimeError(f"{way} did not bring the weights: log-probs {found}, others' {wanted}, of zeros {without}")
        seconds: dict[str, list[float]] = {way: [] for way in (*ways, "bare_copy")}
        for _ in range(rounds):
            for way in ways:
                seconds[way].append(await syncs.run(way, buckets))
            started = time.perf_counter()
            for bucket in buckets:
                bucket.flat.clone()
            seconds["bare_copy"].append(time.perf_counter() - started)
        for delivery in ways.values():
            await delivery.close()
    return seconds


def buckets_of_a_model(config: Config, work: Path) -> list[Bucket]:
    """Buckets of random fp32 weights of the tiny policy's architecture. work: folder for its config.json."""
    model = new_model(config.tiny, tokenizer_of(config.tiny))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(work)
    return list(buckets_of(read_architecture(work), model.state_dict(), config.sglang.bucket_mib << 20))


def table(result: dict[str, Any]) -> str:
    """The result as text, fastest first."""
    lines = [f"{result['bytes'] / 1e9:.3f} GB, {'median s':>14}{'min s':>10}{'x text':>10}"]
    text = result["contestants"]["text"]["median_s"]
    for name, one in sorted(result["contestants"].items(), key=lambda item: item[1]["median_s"]):
        lines.append(f"  {name:<16}{one['median_s']:>10.3f}{one['min_s']:>10.3f}{one['median_s'] / text:>10.3f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 2 if an option is wrong or there is no server."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        overrides = [] if options.quick else LARGE
        if options.bucket_mib is not None:
            overrides = [*overrides, f"sglang.bucket_mib={options.bucket_mib}"]
        config = load_config(ROOT / CONFIG, overrides)
        python = ROOT / config.sglang.python
        if not python.exists():
            raise UserError(f"there is no {python}; `bash tools/setup_env.sh --sglang` makes it")
        os.chdir(ROOT)  # the path of the server's command is relative to it
        with tempfile.TemporaryDirectory() as work:
            buckets = buckets_of_a_model(config, Path(work))
            with real_server(Path(work), overrides) as url:
                seconds = asyncio.run(measure(url, buckets, options.rounds))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    result = {
        "environment": environment(ROOT),
        "quick": options.quick,
        "bytes": sum(len(bucket.flat) for bucket in buckets),
        "buckets": len(buckets),
        "contestants": {name: summary(each) for name, each in seconds.items()},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
