"""Rules about sampling and servers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config


def rollout(config: Config) -> Iterator[Violation]:
    """Sampling."""
    rollout = config.rollout
    if rollout.samples_per_prompt < 2:
        yield Violation(
            ("rollout.samples_per_prompt",),
            "must be at least 2: the advantage compares the responses to one prompt, and is 0 for a single one",
        )
    if not 0 < rollout.top_p <= 1:
        yield Violation(("rollout.top_p",), "must be greater than 0 and at most 1")
    if rollout.max_logprob_gap is not None and rollout.max_logprob_gap <= 0:
        yield Violation(("rollout.max_logprob_gap",), "must be greater than 0; null takes the default of the dtype")
    updates = config.train.minibatches
    if updates >= 1 and rollout.prompts_per_step % updates:
        yield Violation(
            ("rollout.prompts_per_step", "train.minibatches"),
            "prompts_per_step must be divisible by minibatches, as minibatches are made of whole groups",
        )


def sglang(config: Config) -> Iterator[Violation]:
    """Servers."""
    sglang = config.sglang
    if any(not re.match(r"https?://[^/]+", url) for url in sglang.urls):
        yield Violation(("sglang.urls",), "every server's address must be http://host:port")
    if len(set(sglang.urls)) < len(sglang.urls):
        yield Violation(("sglang.urls",), "must not name a server twice")
    if sglang.devices and len(sglang.devices) != sglang.servers * sglang.tp:
        yield Violation(
            ("sglang.devices", "sglang.servers", "sglang.tp"),
            f"{sglang.servers} servers of tp {sglang.tp} take {sglang.servers * sglang.tp} GPUs",
        )
