"""`model.path: tiny`: the warm-started policy, built once per set of settings and cached.

It stays consistent when several ranks ask at once and any of them may be killed:

1. A finished build is the directory `tiny-<hash of the settings>`, created by a rename: it is complete or absent.
2. The builder holds `tiny-<hash>.lock` (flock: the kernel releases it when its holder dies) and writes to
   `tiny-<hash>.partial`.
3. The other ranks poll, with a deadline, for the lock. A rank that gets it after a builder died finds no finished directory,
   deletes the partial one, and builds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from etr_megatron.config.schema import ArithmeticConfig, TinyConfig
from etr_megatron.data.warm_start import new_model, train_tokenizer, warm_start
from etr_megatron.errors import UserError
from etr_megatron.platform.file_lock import try_lock
from etr_megatron.platform.files import sync_to_disk

_RECIPE = 1
"""Increment when a change to this code would build a different policy from the same settings."""
_POLL_S = 0.2


def build_tiny_policy(tiny: TinyConfig, arithmetic: ArithmeticConfig, *, progress: bool, timeout_s: float = 1800.0) -> Path:
    """The directory (HuggingFace format: weights, config, tokenizer) of the tiny policy, built if the cache lacks it.

    The build takes a minute or two on one CPU thread and is bit-identical for the same settings and machine. It leaves the
    caller's torch thread count and random state unchanged. Safe to call from every rank at once: one builds, the others
    wait.

    Args:
        tiny: architecture, warm start, and `cache_dir`.
        arithmetic: digits and operators of the warm start; its counts and seed have no effect.
        progress: show a progress bar while building.
        timeout_s: seconds to wait for another process that builds the same policy.

    Raises:
        UserError: the cache cannot be written, or another process is still building after `timeout_s`.
    """
    finished = tiny_policy_path(tiny, arithmetic)
    try:
        if finished.is_dir():
            return finished
        finished.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(finished, timeout_s) as build:
            if build:
                _build(finished, tiny, arithmetic, progress=progress)
    except (OSError, SafetensorError) as error:
        way_out = "name" if isinstance(error, PermissionError) else "free space there or name"
        raise UserError(
            f"tiny.cache_dir {tiny.cache_dir!r} cannot hold the tiny policy ({getattr(error, 'strerror', None) or error}): "
            f"{way_out} another directory"
        ) from error
    return finished


def tiny_policy_path(tiny: TinyConfig, arithmetic: ArithmeticConfig) -> Path:
    """The cache directory for the tiny policy of these settings, whether built or not."""
    return Path(tiny.cache_dir) / f"tiny-{_settings_hash(tiny, arithmetic)}"


def _settings_hash(tiny: TinyConfig, arithmetic: ArithmeticConfig) -> str:
    """12 hex digits over everything that determines the policy."""
    return hashlib.sha256(json.dumps(_settings(tiny, arithmetic), sort_keys=True).encode()).hexdigest()[:12]


def _settings(tiny: TinyConfig, arithmetic: ArithmeticConfig) -> dict[str, Any]:
    settings = {f"tiny.{name}": value for name, value in dataclasses.asdict(tiny).items() if name != "cache_dir"}
    for name in ("min_digits", "max_digits", "operators"):
        settings[f"arithmetic.{name}"] = getattr(arithmetic, name)
    return settings | {"recipe": _RECIPE}


@contextmanager
def _only_builder(finished: Path, timeout_s: float) -> Iterator[bool]:
    """Yields True while holding the build lock, or False once another process has finished the build."""
    lock_path = finished.with_name(finished.name + ".lock")
    deadline = time.monotonic() + timeout_s
    with lock_path.open("a") as lock:
        while not try_lock(lock.fileno(), lock_path):
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process has been building the tiny policy for more than {timeout_s:g} s (it holds {lock_path}): "
                    "wait for it, end it, or set another tiny.cache_dir"
                )
            time.sleep(_POLL_S)
        yield not finished.is_dir()  # closing the file releases the lock


def _build(finished: Path, tiny: TinyConfig, arithmetic: ArithmeticConfig, *, progress: bool) -> None:
    """Build into the partial directory and rename it; the caller holds the lock."""
    partial = finished.with_name(finished.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny.warm_start_seed)
        tokenizer = train_tokenizer(tiny, arithmetic)
        model = new_model(tiny, tokenizer)
        loss = warm_start(model, tokenizer, tiny, arithmetic, progress=progress)
    save_file(model.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(partial)
    model.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    made_from = {"settings": _settings(tiny, arithmetic), "last_loss_nats_per_token": loss}
    (partial / "warm_start.json").write_text(json.dumps(made_from, indent=2) + "\n")
    for path in partial.iterdir():  # else a power cut could leave a renamed directory with empty files
        sync_to_disk(path)
    os.rename(partial, finished)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one torch thread inside, so that sums, and hence weights, do not depend on the machine's core count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
