"""A hand of groups, an engine that draws for it, and other helpers of its tests."""

from __future__ import annotations

import contextlib
import json

from safetensors.torch import load, save

from etr_megatron.config import Config
from etr_megatron.config.schema import RolloutConfig, RunConfig
from etr_megatron.data import PromptCursor
from etr_megatron.reward import Grade
from etr_megatron.rollout import EngineGoneError, NeedsSyncError
from etr_megatron.rollout.engine import Draw, Drawn
from etr_megatron.rollout.hand import Hand
from etr_megatron.types import Problem


class Problems(list):
    fingerprint = "these"


def problems(count: int = 40) -> Problems:
    return Problems(Problem(f"p{number}", f"{number}?", str(number), [number, 7]) for number in range(count))


class Engine:
    """Draws a token for every request at a time; token n of a response is n, its log-prob -n - version / 10.

    beside: tokens drawn for each request between a step's groups and the weight sync. bad: ids of problems that it gives up.
    finish: why a response ends. submitted: every request, with the tokens that it had when submitted.
    """

    def __init__(self, lengths=lambda problem, index: 4, beside: int = 0, bad=(), finish: str = "stop") -> None:
        self.bad, self._finish = bad, finish
        self.submitted: list[tuple[Draw, list[int]]] = []
        self.weight_version, self._lengths, self._under_way, self._beside = 0, lengths, [], beside
        self.asked, self.is_gone, self.needs_sync = 0, False, False

    def submit(self, draws):
        self.asked += sum(not draw.drawn for draw in draws)
        self.submitted += [(draw, list(draw.drawn)) for draw in draws]
        self._under_way += [(draw, []) for draw in draws]

    def wait(self, timeout_s):
        if self.is_gone:
            raise EngineGoneError("no server is left")
        if self.needs_sync:
            raise NeedsSyncError("the last one")
        finished, rounds = [], 0
        while not finished and rounds < 100 * timeout_s:
            finished, rounds = self._draw(), rounds + 1
        return finished

    def _draw(self):
        for draw, drawn in self._under_way:
            drawn.append(len(draw.drawn) + len(drawn))
        under_way, self._under_way, found = self._under_way, [], []
        for draw, drawn in under_way:
            if draw.problem.id in self.bad:
                why = f"{draw.problem.id} is bad"
                found.append(Drawn(draw.key, [], [], "abort", self.weight_version, given_up=why))
            elif len(draw.drawn) + len(drawn) >= self._lengths(draw.problem, draw.index):
                found.append(self._answer(draw, drawn, self._finish))
            else:
                self._under_way.append((draw, drawn))
        return found

    def stop(self, *, abort):
        found = [one for _ in range(self._beside) for one in self._draw()]
        while self._under_way and not abort:
            found += self._draw()
        found += [self._answer(draw, drawn, "abort") for draw, drawn in self._under_way]
        self._under_way = []
        return found

    def _answer(self, draw, drawn, finish):
        return Drawn(draw.key, drawn, [-n - self.weight_version / 10 for n in drawn], finish, self.weight_version)


def grader(flat=()):
    """Alternating rewards 0 and 1, in the order of a group's samples; all 0 for the problems in `flat`."""

    def grade(requests):
        return [Grade(0.0 if f"p{one.answer}" in flat else float(place % 2), "ok", "") for place, one in enumerate(requests)]

    return grade


def timer(_phase):
    return contextlib.nullcontext()


def hand_of(engine, *, flat=(), count=40, steps=9, prompts=4, shuffle=False, **rollout) -> Hand:
    settings = RolloutConfig(prompts_per_step=prompts, samples_per_prompt=2, backend="sglang", **rollout)
    config = Config(run=RunConfig(steps=steps), rollout=settings)
    cursor = PromptCursor(problems(count), seed=1, shuffle=shuffle)
    return Hand(config, engine, cursor, lambda ids: " ".join(map(str, ids)), grader(flat))


def through_disk(state: dict) -> dict:
    """The state as a checkpoint returns it: all but the tensors through JSON."""
    tensors = load(save(state.pop("tensors")))
    return {**json.loads(json.dumps(state)), "tensors": tensors}


def names(rollouts) -> list[str]:
    return [group.problem.id for group in rollouts.groups]


def sync(hand: Hand, engine: Engine) -> None:
    hand.pause()
    engine.weight_version += 1
    hand.resume()


def assert_whole(rollouts, lengths=lambda problem, index: 4) -> None:
    """Every group is complete and rewarded, and each response's tokens are contiguous."""
    for group in rollouts.groups:
        assert [sample.index for sample in group.samples] == [0, 1]
        for sample in group.samples:
            assert sample.response_ids.tolist() == list(range(lengths(group.problem, sample.index)))
            versions = sample.token_versions()
            assert sample.rollout_logprobs.tolist() == [-n - v / 10 for n, v in zip(sample.response_ids, versions, strict=True)]
            assert sample.finish_reason == "stop" and sample.reward is not None and sample.text
