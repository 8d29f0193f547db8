"""A buffer of groups, an engine that draws for it, and other helpers of its tests."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
from safetensors.torch import load, save

from etr_megatron.config import Config
from etr_megatron.config.schema import RolloutConfig, RunConfig, SglangConfig
from etr_megatron.data import PromptCursor
from etr_megatron.environment import EnvironmentReply
from etr_megatron.platform.background_loop import BackgroundLoop
from etr_megatron.reward import Grade
from etr_megatron.rollout import EngineGoneError, NeedsSyncError
from etr_megatron.rollout.dialogues import Dialogues
from etr_megatron.rollout.engine import GenerationOutput, GenerationRequest, Place
from etr_megatron.rollout.rollout_buffer import RolloutBuffer
from etr_megatron.types import Problem
from tests.graders import Graders


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
        self.submitted: list[tuple[GenerationRequest, list[int]]] = []
        self.weight_version, self._lengths, self._under_way, self._beside = 0, lengths, [], beside
        self.asked, self.is_gone, self.needs_sync = 0, False, False

    def submit(self, draws):
        self.asked += sum(not draw.generated_ids for draw in draws)
        self.submitted += [(draw, list(draw.generated_ids)) for draw in draws]
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
            drawn.append(len(draw.generated_ids) + len(drawn))
        under_way, self._under_way, found = self._under_way, [], []
        for draw, drawn in under_way:
            if draw.problem.id in self.bad:
                why = f"{draw.problem.id} is bad"
                found.append(GenerationOutput(draw.key, [], [], "abort", self.weight_version, given_up=why))
            elif finish := self._end_of(draw, drawn):
                found.append(self._answer(draw, drawn, finish))
            else:
                self._under_way.append((draw, drawn))
        return found

    def _end_of(self, draw, drawn) -> str:
        return self._finish if len(draw.generated_ids) + len(drawn) >= self._lengths(draw.problem, draw.index) else ""

    def stop(self, *, abort):
        found = [one for _ in range(self._beside) for one in self._draw()]
        while self._under_way and not abort:
            found += self._draw()
        found += [self._answer(draw, drawn, "abort") for draw, drawn in self._under_way]
        self._under_way = []
        return found

    def _answer(self, draw, drawn, finish):
        logprobs, place = [-n - self.weight_version / 10 for n in drawn], Place(f"s{draw.key % 3}", draw.key % 2)
        return GenerationOutput(draw.key, drawn, logprobs, finish, self.weight_version, place=place)


class Talker(Engine):
    """As `Engine`, but draws turns; `turn_length` says how long they are."""

    def _end_of(self, draw, drawn) -> str:
        ids = [*draw.generated_ids, *drawn]
        begin = max((place + 1 for place, token in enumerate(ids) if token >= REPLY), default=0)
        assert draw.turn_begin == begin
        turn = 1 + sum(token >= REPLY > after for token, after in itertools.pairwise(ids))
        if len(ids) - begin >= turn_length(int(draw.problem.answer), draw.index, turn):
            return "stop"
        return "length" if len(drawn) >= draw.max_new_tokens else ""


REPLY = 1000
"""The tokens of replies; those of turns are below."""


def turn_length(number: int, index: int, turn: int) -> int:
    """Of the response `index` to the problem `p<number>`; no two responses to it have the same first turn."""
    return 1 + index + 2 * ((number + turn) % 3)


def reply_of(number: int, turn: int) -> list[int] | None:
    """The reply's tokens after this turn; there are one to three turns."""
    return None if turn > number % 3 else [REPLY + 10 * number + turn] * (1 + (number + turn) % 2)


class Environment:
    """Answers as `reply_of` says, `delay` calls of `poll` later. asked: the answer and the messages of every request.

    slow: whether it does not answer, by the problem's number. broken: the status of calls that go wrong, by the same.
    polls: how often it was looked at.
    """

    def __init__(self, delay=lambda: 0, slow=lambda number: False, broken=lambda number: "") -> None:
        self.delay, self.slow, self.broken, self.asked = delay, slow, broken, []
        self._under_way, self.polls = {}, 0

    def submit(self, key, request):
        self.asked.append((request.answer, words(message["content"] for message in request.messages)))
        self._under_way[key] = [self.delay(), request]

    def poll(self, timeout_s):
        self.polls += 1
        waiting = self._under_way.items()
        found = [key for key, (left, request) in waiting if left <= 0 and not self.slow(int(request.answer))]
        for waiting in self._under_way.values():
            waiting[0] -= 1
        return [(key, self._reply(self._under_way.pop(key)[1])) for key in found]

    def _reply(self, request):
        number = int(request.answer)
        if status := self.broken(number):
            return EnvironmentReply(None, status, f"{status} of p{number}")
        ids = reply_of(number, sum(one["role"] == "assistant" for one in request.messages))
        return EnvironmentReply(None if ids is None else [{"role": "user", "content": words(ids)}], "ok", "")


def words(ids) -> str:
    return " ".join(map(str, ids))


def graders_of(buffer: RolloutBuffer) -> Graders:
    return buffer._grading._grader


def grader(flat=()):
    """Alternating rewards 0 and 1 for the responses to a problem, in dialogues by the length of the last turn, which differs
    between a group's samples; all 0 for the problems in `flat`."""
    graded: Counter[str] = Counter()

    def reward(one) -> float:
        graded[one.answer] += 1
        number = len(one.response.split()) if one.messages else graded[one.answer]
        return 0.0 if f"p{one.answer}" in flat else float(number % 2 == 0)

    return lambda requests: [Grade(reward(one), "ok", "") for one in requests]


def timer(_phase):
    return contextlib.nullcontext()


def buffer_of(
    engine, *, flat=(), count=40, steps=9, prompts=4, shuffle=False, environment=None, max_turns=8, placement=None, **rollout
) -> RolloutBuffer:
    settings = RolloutConfig(prompts_per_step=prompts, samples_per_prompt=2, backend="sglang", **rollout)
    config = Config(run=RunConfig(steps=steps), rollout=settings, sglang=SglangConfig(placement=placement))
    asked, dialogues = problems(count), None
    if environment is not None:
        asked = Problems(replace(one, messages=[{"role": "user", "content": one.prompt}]) for one in asked)
        dialogues = Dialogues(environment, lambda reply, last: ids_of(reply[0]), words, max_turns=max_turns)
    cursor = PromptCursor(asked, seed=1, shuffle=shuffle)
    return RolloutBuffer(config, engine, cursor, words, Graders(grader(flat)), dialogues)


def ids_of(message) -> list[int]:
    return [int(word) for word in message["content"].split()]


@pytest.fixture
def without_background(monkeypatch):
    monkeypatch.setattr(BackgroundLoop, "start", lambda self: None)


def through_disk(state: dict) -> dict:
    """The state as a checkpoint returns it: all but the tensors through JSON."""
    tensors = load(save(state.pop("tensors")))
    return {**json.loads(json.dumps(state)), "tensors": tensors}


def names(rollouts) -> list[str]:
    return [group.problem.id for group in rollouts.groups]


def sync(buffer: RolloutBuffer, engine: Engine) -> None:
    buffer.pause()
    engine.weight_version += 1
    buffer.resume()


def assert_whole(rollouts, lengths=lambda problem, index: 4) -> None:
    """Every group is complete and rewarded, and each response's tokens are contiguous."""
    for group in rollouts.groups:
        assert [sample.index for sample in group.samples] == [0, 1]
        for sample in group.samples:
            assert sample.response_ids.tolist() == list(range(lengths(group.problem, sample.index)))
            versions = sample.token_versions()
            assert sample.rollout_logprobs.tolist() == [-n - v / 10 for n, v in zip(sample.response_ids, versions, strict=True)]
            assert sample.finish_reason == "stop" and sample.reward is not None and sample.text


def assert_dialogue(problem: Problem, sample, *, limit: int = 256, max_turns: int = 8) -> None:
    """The sample is the whole dialogue that `turn_length` and `reply_of` make, with the log-probs of its tokens' versions."""
    number, ids, mask, messages, finish = int(problem.answer), [], [], [], ""
    while not finish:
        turn = 1 + sum(message["role"] == "assistant" for message in messages)
        room = limit - len(ids)
        drawn = list(range(len(ids), len(ids) + min(room, turn_length(number, sample.index, turn))))
        ids, mask = ids + drawn, mask + [1] * len(drawn)
        messages.append({"role": "assistant", "content": words(drawn)})
        reply = reply_of(number, turn)
        if len(drawn) < turn_length(number, sample.index, turn):
            finish = "length"
        elif reply is None:
            finish = "stop"
        elif turn >= max_turns or len(ids) + len(reply) >= limit:
            finish = "length"
        else:
            ids, mask = ids + reply, mask + [0] * len(reply)
            messages.append({"role": "user", "content": words(reply)})
    assert sample.response_ids.tolist() == ids and sample.text == words(ids)
    assert sample.loss_mask.tolist() == (mask if 0 in mask else [])
    assert sample.messages == messages and sample.finish_reason == finish and sample.reward is not None
    versions = sample.token_versions().tolist()
    assert versions == sorted(versions) and versions[-1] == sample.weight_version
    assert sample.weight_versions.tolist() == (versions if len(set(versions)) > 1 else [])
    expected = [-n - version / 10 if is_drawn else 0.0 for n, version, is_drawn in zip(ids, versions, mask, strict=True)]
    assert sample.rollout_logprobs.tolist() == expected
    for place in range(1, len(ids)):
        assert mask[place] or versions[place] == versions[place - 1]
