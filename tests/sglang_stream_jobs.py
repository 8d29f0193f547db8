"""What gang ranks run to see a step's groups survive their servers: the sampler that training uses, on servers of the job."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from etr_megatron.config import Config
from etr_megatron.config.schema import RolloutConfig, RunConfig
from etr_megatron.data import PromptCursor
from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout import StreamingSampler
from etr_megatron.types import Problem
from tests.policy_jobs import build
from tests.sglang_jobs import Problems, behaving, engine_of, states_of


def lost_while_streaming(model: str, directory: str, number: int, steps: int, rollout: dict, **settings: Any) -> dict[str, Any]:
    """Steps of a sampler on two fake servers of the job, with a sync before each; in the second the first server gets a signal.

    Returns the steps' groups, the servers that had failed after each step, the victim's process, and the servers' states after
    the last step.
    """
    with behaving({"tokens_per_s": 60, "odd_tokens_per_s": 12}):  # those that are started anew as well
        return _lost_while_streaming(model, directory, number, steps, rollout, **settings)


def _lost_while_streaming(
    model: str, directory: str, number: int, steps: int, rollout: dict[str, Any], **settings: Any
) -> dict:
    policy = build(model, ["parallel.tp=1"])
    engine = engine_of(policy, model, directory, probe_every=0, servers=2, **settings)
    config = Config(run=RunConfig(steps=steps), rollout=RolloutConfig(**rollout, samples_per_prompt=2, backend="sglang"))
    problems = Problems(Problem(f"p{i}", "", "", [3 + i, 7]) for i in range(40))

    def grade(requests: Sequence[GradeRequest]) -> list[Grade]:
        return [Grade(float(i % 2), "ok", "") for i in range(len(requests))]

    sampler = StreamingSampler(config, engine, PromptCursor(problems, seed=1, shuffle=False), str, grade)
    found: dict[str, Any] = {"steps": [], "failed": [], "pid": 0}
    try:
        for step in range(1, steps + 1):
            sampler.pause()
            engine.update_weights(policy.export(), step)
            sampler.resume()
            if step == 2:
                found["pid"] = states_of(engine)["SGLang server 0"]["pid"]
                threading.Timer(0.3, os.kill, (found["pid"], number)).start()
            groups = sampler.take(step, lambda _phase: nullcontext()).groups
            found["steps"].append([asdict(group) for group in groups])
            found["failed"].append(engine._control.fleet.failed)
        sampler.pause()
        return found | {"states": states_of(engine)}
    finally:
        engine.close()
