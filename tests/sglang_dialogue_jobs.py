"""Jobs of a sampler whose responses have several turns, on SGLang servers; processes of their own are the environment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from etr_megatron.config import Config, EnvironmentConfig
from etr_megatron.config.schema import EvalConfig, RolloutConfig, RunConfig, TrainConfig
from etr_megatron.data import PromptCursor
from etr_megatron.environment import EnvironmentPool
from etr_megatron.evaluation import HeldOut, evaluate
from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout import NeedsSyncError, StreamingSampler
from etr_megatron.rollout.dialogues import Dialogues
from etr_megatron.rollout.engine import Sampling, never
from etr_megatron.rollout.rank0 import on_rank0
from etr_megatron.rollout.sglang import SglangEngine
from etr_megatron.rollout.stops import StopStrings
from etr_megatron.types import Message, Problem
from tests.dialogue_functions import words
from tests.fake_servers import impatient_with, patient_with
from tests.graders import Graders
from tests.policy_jobs import build, make_batch
from tests.sglang_comeback_jobs import fails_soon
from tests.sglang_jobs import TEMPERATURE, Problems, _gaps_by_version, behaving, engine_of, states_of
from tests.sglang_stream_jobs import sync
from tests.stop_jobs import letters

STOPS = tuple(letters([token]) for token in (10, 20, 30, 40))
"""Texts that end a turn of a fake server, whose responses count on from the last token."""


def config_of(steps: int, rollout: Mapping[str, Any], routing: bool = False) -> Config:
    return Config(
        run=RunConfig(steps=steps),
        rollout=RolloutConfig(**{"samples_per_prompt": 2, "temperature": TEMPERATURE, "backend": "sglang", **rollout}),
        train=TrainConfig(routing_replay=routing),
        environment=EnvironmentConfig(function="tests.dialogue_functions:by_number", workers=3, max_turns=3),
        eval=EvalConfig(samples=2, temperature=TEMPERATURE),
    )


def problem(number: int, prompt: Sequence[int]) -> Problem:
    return Problem(f"p{number}", "", str(number), [3 + number, *prompt], messages=[{"role": "user", "content": str(number)}])


def grade(requests: Sequence[GradeRequest]) -> list[Grade]:
    return [Grade(float(i % 2), "ok", "") for i in range(len(requests))]


@contextmanager
def dialogues_of(config: Config) -> Iterator[Dialogues | None]:
    """With a pool of real processes, on rank 0."""
    if dist.get_rank():
        yield None
        return
    with EnvironmentPool(config.environment) as pool:

        def ids(messages: Sequence[Message], last: int) -> list[int]:
            return [int(word) for message in messages for word in message["content"].split()]

        yield Dialogues(pool, ids, words, max_turns=config.environment.max_turns)


def lost_in_dialogues(
    model: str, directory: str, how: str, steps: int, rollout: dict[str, Any], trains_s: float, **settings: Any
) -> dict[str, Any]:
    """Steps of a sampler on two fake servers of the job, with a sync before each; in the second step or soon after, the first
    server dies or stops (`how`). Returns the steps' weight versions, groups and counts, and what failed."""
    config, found = config_of(steps, rollout), {"steps": [], "failed": {}}
    behaviour = {"tokens_per_s": 300, "odd_tokens_per_s": 100}
    with behaving(behaviour), dialogues_of(config) as dialogues, ExitStack() as until_it_is_lost:
        policy, stops = build(model, ["parallel.tp=2"]), StopStrings(STOPS, letters)
        engine = engine_of(policy, model, directory, probe_every=0, servers=2, stop_strings=stops, **settings)
        cursor = PromptCursor(Problems(problem(number, [7]) for number in range(40)), seed=1, shuffle=False)
        sampler = StreamingSampler(config, engine, cursor, words, Graders(grade) if dialogues else None, dialogues)
        first, *others = engine._control.fleet.clients if engine._control is not None else [None]
        patient_with(others)
        try:
            for step in range(1, steps + 1):
                _sync(sampler, engine, policy, step - 1, found["failed"])
                if step == 2 and engine._control is not None:
                    fails_soon(engine._control, how)
                    until_it_is_lost.enter_context(impatient_with(first, 2.0, routes=("/abort_request",)))
                taken = _take(sampler, engine, policy, step, found["failed"])
                found["steps"].append((engine.weight_version, [asdict(group) for group in taken.groups], taken.counts))
                if first is not None and first.name in found["failed"]:
                    until_it_is_lost.close()
                    patient_with([first])  # when it is back, it is well
                time.sleep(trains_s)  # dialogues go on
            sampler.pause()
            return found
        finally:
            sampler.close()
            engine.close()


def two_rounds(model: str, directory: str, **settings: Any) -> list[list[tuple[list[int], int | None]]]:
    """Prompts that each server got, with their attention groups: those of five responses, and of the further turns of three of
    them, in another order."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, probe_every=0, **settings)
    try:
        engine.update_weights(policy.export(), 1)
        problems = [Problem(f"p{number}", "", "", [number, 7]) for number in range(5)]
        sampling = Sampling(1, 5, 1.0, seed=1, step=1)
        engine.generate(problems, sampling)
        further = [replace(problems[number], id=f"p{number}/0/2", prompt_ids=[number, 7, 9]) for number in (4, 2, 1)]
        engine.generate(further, replace(sampling, continued=("p4/0", "p2/0", "p1/0")))
        return [list(zip(state["prompts"], state["ranks"], strict=True)) for state in states_of(engine).values()]
    finally:
        engine.close()


def _sync(sampler: StreamingSampler, engine: SglangEngine, policy: Any, version: int, failed: dict[str, str]) -> None:
    sampler.pause()  # finds out by now if a server hangs
    failed |= on_rank0(lambda: dict(engine._control.fleet.failed))
    engine.update_weights(policy.export(), version)
    sampler.resume()


def _take(sampler: StreamingSampler, engine: SglangEngine, policy: Any, step: int, failed: dict[str, str]) -> Any:
    while True:
        try:
            return sampler.take(step, lambda _phase: nullcontext())
        except NeedsSyncError:
            _sync(sampler, engine, policy, engine.weight_version, failed)


def streamed_dialogues(
    model: str,
    directory: str,
    prompts: list[list[int]],
    steps: int,
    rollout: dict[str, Any],
    stop_ids: Sequence[int],
    routing: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Steps of a sampler on a real server, with an update and a sync between, and an evaluation after the last sync.

    Returns the steps' weight versions, groups and counts, the evaluation's groups, and for every sample the largest gap to
    transformers' log-probs of drawn tokens under the weights that their versions name, and under those of the sync after
    (without routing).
    """
    policy, config = build(model, ["train.lr=0.02", f"rollout.temperature={TEMPERATURE}"]), config_of(steps, rollout, routing)
    engine = engine_of(policy, model, directory, stop_ids=stop_ids, probe_every=0, routing=routing, **settings)
    problems = [problem(number, prompts[number % 3]) for number in range(43)]
    weights: dict[int, dict[str, torch.Tensor]] = {}
    found: dict[str, Any] = {"steps": []}

    def update(batch: Any) -> None:
        if batch is not None:
            policy.update(batch)
        weights[len(weights)] = {name: tensor.clone() for name, tensor in policy.export()}

    with dialogues_of(config) as dialogues:
        cursor = PromptCursor(Problems(problems[:40]), seed=1, shuffle=False)
        sampler, batch = StreamingSampler(config, engine, cursor, words, Graders(grade), dialogues), None
        common = dict(decode=words, grader=grade, dialogues=dialogues, must_stop=never, with_servers=lambda draw: draw())
        try:
            for step in range(1, steps + 1):
                update(batch)
                sync(sampler, engine, policy, len(weights) - 1)
                if step == steps:  # dialogues of the sampler go on beside it
                    sets = evaluate(engine, HeldOut({"": problems[40:]}), config, **common)
                taken = sampler.take(step, lambda _phase: nullcontext())
                found["steps"].append((len(weights) - 1, [asdict(group) for group in taken.groups], taken.counts))
                samples = [(group.problem.prompt_ids, one.response_ids) for group in taken.groups for one in group.samples]
                batch = replace(make_batch(samples), old_logp=policy.logprobs(samples).logp)
            sampler.pause()
        finally:
            sampler.close()
            engine.close()
    found["evaluated"] = [asdict(group) for group in sets[""]]
    if routing:  # transformers' own names of experts' weights are others
        return found
    update(batch)
    groups = [*(group for _, groups, _ in found["steps"] for group in groups), *found["evaluated"]]
    return found | {later: _gaps_by_version(model, groups, weights, number) for number, later in enumerate(("gaps", "wrong"))}
