"""Throughput of the rollout path relative to a bare loop that sends the same requests to the same SGLang server.

    bash tools/setup_env.sh --sglang && python -m benchmarks.rollout        # all parts
    python -m benchmarks.rollout --part client --part tail --part replies   # without a real server
    python -m benchmarks.rollout --quick --part client --part tail          # checks that it works; its times mean nothing

Parts:

- `server`: a real SGLang server on CPU with a small random model; all responses have the same length.
- `client`: a server without a model (`rollout_server.py`) that answers at once. Measures the cost of a request in this process,
  in CPU seconds of all its threads.
- `tail`: the same server. One response in a hundred is eight times as long as the others; all have the same tokens per second.
  Measures how long a step waits for its groups and for its weight sync: with partial rollouts, without them, and without long
  responses. Ranks "train" by sleeping for the duration of an ordinary response; there are no weights.
- `replies`: CPU time of the parsing of one reply, against the former way with lists of Python objects (`rollout_replies.py`).

Contestants:

- `sampler`: ours, from `Sampler.take` to complete groups with their texts.
- `bare_loop`: asyncio and httpx; the JSON of replies is parsed and dropped.
- `bare_connections`: the same loop over our connections (`rollout/sglang/connections.py`).

All run in this process, round robin, in alternating order. Each round has new prompts, the server's cache is flushed before
each contestant, and the first round is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.experiment_environment import environment
from benchmarks.output import code_of_stoppable, prepare_output
from benchmarks.rollout_contestants import Sampled, Shape, config_of, contestants, make_problems, tokenizer_of
from benchmarks.rollout_replies import QUICK as QUICK_REPLIES
from benchmarks.rollout_replies import SIZES, measure_replies, replies_table
from benchmarks.rollout_report import pair_result, pair_table, tail_result, tail_table
from etr_megatron.config import load_config, startup_timeout_of
from etr_megatron.data.warm_start import new_model
from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.commands import server_command
from etr_megatron.rollout.sglang.hosts import Host

PARTS = ["server", "client", "tail", "replies"]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONFIG = "configs/cpu_tiny_sglang.yaml"
PROMPT_TOKENS = 32
SERVER = Shape(prompts=8, samples=8, tokens=32, concurrency=64)
CLIENT = {"short": Shape(64, 8, 16), "long": Shape(16, 8, 2048), "many at once": Shape(64, 8, 16, concurrency=512)}
QUICK = {"short": Shape(2, 4, 5)}
ORDINARY_S, TAIL_SHARE, TAIL_FACTOR, STALENESS = 1.0, 0.01, 8, 8
"""Seconds of an ordinary response, share and relative length of the long ones, and the largest staleness of their tokens."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 if an option is wrong. Raises `UserError` for values that do not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small steps, 2 rounds")
    parser.add_argument("--rounds", type=int, help="timed steps of each contestant (default 12, quick 2)")
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable (all)")
    parser.add_argument("--output", type=Path, help="JSON (default benchmarks/results/rollout.json or rollout_quick.json)")
    options = parser.parse_args(argv)
    options.rounds = options.rounds if options.rounds is not None else 2 if options.quick else 12
    options.part = options.part or PARTS
    options.output = options.output or RESULTS / ("rollout_quick.json" if options.quick else "rollout.json")
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; it must be at least 1")
    python = ROOT / load_config(ROOT / CONFIG, []).sglang.python
    if "server" in options.part and not python.exists():
        raise UserError(f"there is no {python}; `bash tools/setup_env.sh --sglang` makes it, or leave out --part server")
    prepare_output(options.output)
    return options


@contextmanager
def server_without_a_model(**responses: Any) -> Iterator[str]:
    """Address of a server without a model; see `rollout_server.Responses` for the arguments."""
    command = [sys.executable, "-m", "benchmarks.rollout_server", json.dumps(responses)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@contextmanager
def real_server(folder: Path, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Address of an SGLang server with the tiny policy's architecture and random weights; no token ends a response.

    overrides: config overrides. Raises UserError if it does not start.
    """
    config = load_config(ROOT / CONFIG, list(overrides))
    model = new_model(config.tiny, tokenizer_of(config.tiny)).config
    model.eos_token_id, model.architectures = None, ["Qwen3ForCausalLM"]
    model.save_pretrained(folder)
    where = dict(place=0, host="127.0.0.1", folder=folder, api_key=None, cuda=False)
    host = Host(
        {"server": server_command(config.sglang, folder, "float32", **where)}, folder, startup_timeout_of(config.sglang)
    )
    try:
        started = host.start(["server"])["server"]
        if started.problem is not None:
            raise UserError(started.problem)
        body = {"new_version": "0", "abort_all_requests": False}
        httpx.post(f"{started.url}/update_weight_version", json=body, timeout=60).raise_for_status()
        yield started.url
    finally:
        host.stop()


def flush_cache(url: str) -> None:
    """Raises httpx.HTTPStatusError if the server is still busy after ten seconds."""
    for _ in range(100):
        reply = httpx.post(f"{url}/flush_cache", timeout=60)
        if reply.status_code == 200:
            return
        time.sleep(0.1)
    reply.raise_for_status()


def compare(name: str, shape: Shape, url: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds and CPU seconds of the contestants' steps. Raises RuntimeError if one returns other than the requested tokens."""
    tokenizer = tokenizer_of()
    problems = make_problems(shape, rounds + 1, PROMPT_TOKENS, len(tokenizer))
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with ExitStack() as stack:
        all_ = {one: stack.enter_context(closing(it)) for one, it in contestants(shape, url, problems, decode, folder).items()}
        for step in range(1, rounds + 2):
            for one in sorted(all_, reverse=step % 2 == 0):
                flush_cache(url)
                began, cpu_began = time.perf_counter(), time.process_time()
                tokens = all_[one].run(step)
                wall.setdefault(one, []).append(time.perf_counter() - began)
                cpu.setdefault(one, []).append(time.process_time() - cpu_began)
                if tokens != shape.requests * shape.tokens:
                    raise RuntimeError(f"{one}: {tokens} tokens where {shape.requests} x {shape.tokens} were asked for")
    return pair_result(
        name, shape, {one: times[1:] for one, times in wall.items()}, {one: times[1:] for one, times in cpu.items()}
    )


def step_waits(url: str, tokens: int, rounds: int, quick: bool, folder: Path, **rollout: Any) -> dict[str, list[float]]:
    """Seconds that each step waits for its groups, and before its weight sync for requests under way."""
    shape = Shape(prompts=2 if quick else 16, samples=8, tokens=tokens * TAIL_FACTOR, concurrency=4096)
    problems = make_problems(shape, (rounds + 1) * (STALENESS + 2), PROMPT_TOKENS, 300)
    sampled = Sampled(config_of(shape, url, **rollout), problems, str, folder)
    found: dict[str, list[float]] = {"groups_s": [], "sync_s": []}
    with closing(sampled):
        for step in range(1, rounds + 2):
            began = time.perf_counter()
            sampled.sampler.take(step, lambda _phase: nullcontext())
            found["groups_s"].append(time.perf_counter() - began)
            time.sleep(ORDINARY_S)
            began = time.perf_counter()
            sampled.sampler.pause()
            found["sync_s"].append(time.perf_counter() - began)
            sampled.sampler.resume()
    return {name: seconds[1:] for name, seconds in found.items()}


def measure_tail(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The waits of all settings, each with its own server."""
    tokens = 40 if options.quick else 400
    ahead = dict(max_staleness=1)
    partial_ = dict(max_staleness=STALENESS, partial=True, max_oversample=2.0)
    settings = {
        "synchronous": ({}, TAIL_SHARE),
        "one step ahead": (ahead, TAIL_SHARE),
        "partial": (partial_, TAIL_SHARE),
        "one step ahead, no tail": (ahead, 0.0),
        "partial, no tail": (partial_, 0.0),
    }
    waits = {}
    for name, (rollout, share) in settings.items():
        lengths = dict(tokens=tokens, tail=tokens * TAIL_FACTOR, tail_share=share, limit=tokens * TAIL_FACTOR)
        with server_without_a_model(**lengths, rate=tokens / ORDINARY_S) as url:
            waits[name] = step_waits(url, tokens, options.rounds, options.quick, folder, **rollout)
    return tail_result(waits, ordinary_s=ORDINARY_S, share=TAIL_SHARE, factor=TAIL_FACTOR)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 0 whether targets are met or not, 2 for a mistake."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        _measure(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"written to {options.output}")
    return 0


def _measure(options: argparse.Namespace) -> None:
    text = options.output.read_text()
    result: dict[str, Any] = json.loads(text) if text else {}  # keeps parts that are not measured now

    def keep(part: str, text: str, **found: Any) -> None:
        said = {"environment": environment(ROOT), "rounds": options.rounds, "load": os.getloadavg()[0]}
        result[part] = said | found
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(text, flush=True)

    with tempfile.TemporaryDirectory(prefix="rollout") as name:
        folder = Path(name)
        if "client" in options.part:
            cases = []
            for case, shape in (QUICK if options.quick else CLIENT).items():
                with server_without_a_model(tokens=shape.tokens) as url:
                    cases.append(compare(case, shape, url, options.rounds, folder))
            keep("client", "\n".join(map(pair_table, cases)), cases=cases)
        if "tail" in options.part:
            found = measure_tail(options, folder)
            keep("tail", tail_table(found), **found)
        if "replies" in options.part:
            found = measure_replies(options.rounds, QUICK_REPLIES if options.quick else SIZES)
            keep("replies", replies_table(found), **found)
        if "server" in options.part:
            shape = QUICK["short"] if options.quick else SERVER
            with real_server(folder / "server") as url:
                found = compare("SGLang on CPU", shape, url, options.rounds, folder / "server")
            keep("server", pair_table(found), cases=[found])


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
