"""The cost of parsing a server's reply in rank 0's process, relative to the former way with lists of Python objects."""

from __future__ import annotations

import base64
import gc
import json
import statistics
import time
import tracemalloc
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.targets import Target, as_json, summary
from etr_megatron.rollout.sglang.replies import read_generated

SIZES = {
    "16 tokens": (16, 0),
    "2,048 tokens": (2048, 0),
    "32,768 tokens": (32768, 0),
    "4,096 tokens, experts": (4096, 48 * 8),
}
"""Response tokens, and experts of a token in all layers (Qwen3-30B-A3B's)."""
QUICK = {"20 tokens": (20, 0), "900 tokens, experts": (900, 2)}
RATIO, LONG = 0.3, 8000
"""Upper bound on the time relative to the former way, for responses of at least this many tokens without experts."""

Parts = tuple[Any, Any, Any]
"""Token ids, log-probs and experts."""


def make_reply(tokens: int, experts: int) -> bytes:
    """A reply as SGLang writes it, with float32 log-probs of which a third are close to 0. experts: of each token."""
    draw = np.random.default_rng(tokens)
    ids = draw.integers(0, 151_936, tokens).tolist()
    scale = np.where(draw.random(tokens) < 0.3, 1e-6, 0.5)
    logprobs = (-draw.exponential(scale)).astype(np.float32).tolist()
    pairs = [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
    meta: dict[str, Any] = {"id": "0", "finish_reason": {"type": "stop", "matched": 2}, "weight_version": "0"}
    meta |= {"input_token_logprobs": [], "output_token_logprobs": pairs, "output_token_logprobs_length": tokens}
    if experts:
        chosen = draw.integers(0, 128, (tokens, experts), np.int32)
        meta["routed_experts"] = base64.b64encode(chosen.tobytes()).decode()
    return json.dumps({"output_ids": ids, "meta_info": meta}, separators=(",", ":")).encode()


def _lists(reply: bytes, routing: bool) -> Parts:
    """The former way: ids and log-probs are lists until a sample is made of them."""
    found = json.loads(reply)
    ids, pairs = list(map(int, found["output_ids"])), found["meta_info"]["output_token_logprobs"]
    logprobs, of = [float(pair[0]) for pair in pairs], [pair[1] for pair in pairs]
    if of != ids:
        raise ValueError("log-probs of other tokens")
    experts = array("B")
    if routing:
        chosen = np.frombuffer(base64.b64decode(found["meta_info"]["routed_experts"], validate=True), np.int32)
        experts = array("B", chosen.astype(np.uint8).tobytes())
    return ids, logprobs, experts


def _arrays(reply: bytes, routing: bool) -> Parts:
    found = read_generated(reply, routing=routing)
    return found.ids, found.logprobs, found.routing


WAYS: dict[str, Callable[[bytes, bool], Parts]] = {"arrays": _arrays, "lists": _lists}


def _sampled(parts: Parts) -> Parts:
    """The fields of a sample."""
    return array("i", parts[0]), array("d", parts[1]), parts[2]


def _held(way: str, reply: bytes, routing: bool) -> int:
    """Bytes of a parsed reply."""
    gc.collect()
    tracemalloc.start()
    parts = WAYS[way](reply, routing)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del parts
    return held


def _compare(name: str, tokens: int, experts: int, rounds: int) -> dict[str, Any]:
    """The two ways with one reply. Raises RuntimeError if they differ."""
    reply, routing = make_reply(tokens, experts), experts > 0
    if _sampled(_arrays(reply, routing)) != _sampled(_lists(reply, routing)):
        raise RuntimeError(f"{name}: the two ways differ")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    repeats = max(1, 2**15 // tokens)
    gc.collect()
    gc.freeze()  # as a job does, so that collections of what lists hold look at nothing else
    for number in range(rounds):
        for way in sorted(WAYS, reverse=number % 2 == 0):
            began = time.process_time()
            for _ in range(repeats):
                _sampled(WAYS[way](reply, routing))
            times[way].append((time.process_time() - began) / repeats)
    ratio = statistics.median(ours / former for ours, former in zip(times["arrays"], times["lists"], strict=True))
    targets = [Target(f"CPU time of {name}, x lists", ratio, RATIO)] if tokens >= LONG and not experts else []
    return {
        "case": name,
        "reply_bytes": len(reply),
        "ratio": ratio,
        "cpu": {way: summary(seconds) for way, seconds in times.items()},
        "held_bytes_per_token": {way: _held(way, reply, routing) / tokens for way in WAYS},
        "targets": as_json(targets),
    }


def measure_replies(rounds: int, sizes: Mapping[str, tuple[int, int]] = SIZES) -> dict[str, Any]:
    """CPU seconds from the bytes of a reply to a sample's arrays, in alternating order, and the bytes that a parsed reply holds
    until its sample is made."""
    return {"cases": [_compare(name, tokens, experts, rounds) for name, (tokens, experts) in sizes.items()]}


def replies_table(found: Mapping[str, Any]) -> str:
    """The costs as text."""
    lines = ["parsing of a reply, CPU ms", f"  {'':<24}{'arrays':>10}{'lists':>10}{'ratio':>8}{'held bytes/token':>24}"]
    for one in found["cases"]:
        ours, former = (one["cpu"][way]["median_s"] * 1e3 for way in ("arrays", "lists"))
        held = "{arrays:.0f} against {lists:.0f}".format(**one["held_bytes_per_token"])
        lines.append(f"  {one['case']:<24}{ours:>10.3f}{former:>10.3f}{one['ratio']:>8.2f}{held:>24}")
        lines += [f"    {'met' if target['met'] else 'missed'}: at most {target['limit']:g}" for target in one["targets"]]
    return "\n".join(lines)
