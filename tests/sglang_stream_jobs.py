"""Jobs that check that a step's groups survive their servers: the sampler that training uses, on servers of the job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from etr_megatron.config import Config
from etr_megatron.config.schema import RolloutConfig, RunConfig, SglangConfig, TrainConfig
from etr_megatron.data import PromptCursor
from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout import EngineGoneError, NeedsSyncError, Rollouts, StreamingSampler
from etr_megatron.rollout.sglang import SglangEngine
from etr_megatron.types import Problem
from tests.fake_servers import impatient_with, patient_with
from tests.graders import Graders
from tests.policy_jobs import build
from tests.sglang_comeback_jobs import fails_soon
from tests.sglang_jobs import Problems, behaving, engine_of, states_of


def lost_while_streaming(model: str, directory: str, how: str, steps: int, rollout: dict, **settings: Any) -> dict[str, Any]:
    """Steps of a sampler on two fake servers of the job, with a sync before each; in the second step or soon after, the first
    server dies or stops (see `fails_soon`).

    Returns the steps' groups, the servers that had failed after each step, the victim's process, and the servers' states after
    the last step.
    """
    with behaving({"tokens_per_s": 120, "odd_tokens_per_s": 24}):  # also for restarted servers
        return _lost_while_streaming(model, directory, how, steps, rollout, **settings)


def _lost_while_streaming(model: str, directory: str, how: str, steps: int, rollout: dict[str, Any], **settings: Any) -> dict:
    policy = build(model, ["parallel.tp=1"])
    engine = engine_of(policy, model, directory, probe_every=0, servers=2, **settings)
    sampler = _sampler(engine, steps, rollout)
    first, *others = engine._control.fleet.clients
    patient_with(others)
    found: dict[str, Any] = {"steps": [], "failed": [], "pid": 0}
    until_it_is_lost = ExitStack()
    try:
        for step in range(1, steps + 1):
            sync(sampler, engine, policy, step)
            if step == 2:
                found["pid"] = fails_soon(engine._control, how)
                until_it_is_lost.enter_context(impatient_with(first, 2.0, routes=("/abort_request",)))
            groups, failed = _take(sampler, engine, policy, step)
            found["steps"].append([asdict(group) for group in groups.groups])
            sampler.pause()  # finds out by now if a server hangs
            found["failed"].append(failed | engine._control.fleet.failed)
            if first.name in found["failed"][-1]:
                until_it_is_lost.close()
                patient_with([first])  # when it is back, it is well
        return found | {"states": states_of(engine)}
    finally:
        until_it_is_lost.close()
        engine.close()


def poisoned(
    model: str, directory: str, steps: int, rollout: dict, poison: int, trains_long: bool, **settings: Any
) -> dict[str, Any]:
    """Steps of a sampler on fake servers of the job that die of the prompt of problem number `poison`, with a sync before each;
    restarts whenever no server is left. trains_long: until the servers have answered everything. Returns the steps' groups and
    counts, and how often all servers were gone."""
    with behaving({"die_prompt": 3 + poison}):
        policy, gone = build(model, ["parallel.tp=1"]), 0
        while True:
            engine = engine_of(policy, model, directory, probe_every=0, **settings)
            sampler, found = _sampler(engine, steps, rollout), []
            try:
                for step in range(1, steps + 1):
                    sync(sampler, engine, policy, step)
                    taken, failed = _take(sampler, engine, policy, step)
                    while trains_long and engine._control.run(_is_busy(engine)):
                        time.sleep(0.05)
                    found.append(([asdict(group) for group in taken.groups], taken.counts, failed))
                return {"steps": found, "gone": gone}
            except EngineGoneError:
                gone += 1
            finally:
                engine.close()


async def _is_busy(engine: SglangEngine) -> bool:
    return bool(engine._control.stream._running)


def routed(model: str, directory: str, steps: int, rollout: dict[str, Any], **settings: Any) -> list[list[dict[str, Any]]]:
    """Groups of the steps of a sampler that requests experts from a fake server of the job, with a sync before each and a
    release of memory after it.

    With partial rollouts, every other response waits until it is cut off.
    """
    with behaving({"tokens_per_s": 400, "odd_pause_at": 9 if rollout.get("partial") else None}):
        policy = build(model, ["parallel.tp=1"])
        engine = engine_of(policy, model, directory, probe_every=0, routing=True, **settings)
        sampler, found = _sampler(engine, steps, rollout, SglangConfig(**settings), routing=True), []
        try:
            for step in range(1, steps + 1):
                sync(sampler, engine, policy, step)
                taken = sampler.take(step, lambda _phase: nullcontext())
                found.append([asdict(group) for group in taken.groups])
                sampler.cut_off()
                engine.release()
            return found
        finally:
            engine.close()


def _sampler(
    engine: SglangEngine, steps: int, rollout: dict[str, Any], sglang: SglangConfig | None = None, routing: bool = False
) -> StreamingSampler:
    settings = {"samples_per_prompt": 2, "backend": "sglang"} | rollout
    train = TrainConfig(routing_replay=routing)
    sglang = sglang or SglangConfig()
    config = Config(run=RunConfig(steps=steps), rollout=RolloutConfig(**settings), sglang=sglang, train=train)
    problems = Problems(Problem(f"p{i}", "", "", [3 + i, 7]) for i in range(40))

    def grade(requests: Sequence[GradeRequest]) -> list[Grade]:
        return [Grade(float(i % 2), "ok", "") for i in range(len(requests))]

    cursor, grader = PromptCursor(problems, seed=1, shuffle=False), Graders(grade) if dist.get_rank() == 0 else None
    return StreamingSampler(config, engine, cursor, str, grader)


def sync(sampler: StreamingSampler, engine: SglangEngine, policy: Any, version: int) -> None:
    """Sync as before a step."""
    sampler.pause()
    engine.update_weights(policy.export(), version)
    sampler.resume()


def _take(sampler: StreamingSampler, engine: SglangEngine, policy: Any, step: int) -> tuple[Rollouts, dict[str, str]]:
    """Take a step as the trainer does; also returns servers that had failed at the end or when a sync was needed."""
    failed: dict[str, str] = {}
    while True:
        try:
            taken = sampler.take(step, lambda _phase: nullcontext())
            return taken, failed | engine._control.fleet.failed
        except NeedsSyncError:
            failed |= engine._control.fleet.failed
            sync(sampler, engine, policy, step)
