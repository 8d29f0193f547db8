"""Dialogues with an environment that answers in the test's own process, and jobs that gang ranks run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch.distributed as dist

from etr_megatron.environment import EnvironmentReply, EnvironmentRequest
from etr_megatron.rollout import Sampling, generate_groups
from etr_megatron.rollout.dialogues import Dialogues
from etr_megatron.rollout.rounds import draw_further_turns
from etr_megatron.types import Message
from tests.rollout_jobs import _engine, _problems

Answer = Callable[[EnvironmentRequest], EnvironmentReply]


def says(text: str, role: str = "user") -> EnvironmentReply:
    return EnvironmentReply([{"role": role, "content": text}], "ok", "")


ENDS = EnvironmentReply(None, "ok", "")


class Environment:
    """Answers at once, but hands its replies out one at a time, in an order of its own. asked: all requests."""

    def __init__(self, answer: Answer, seed: int = 5) -> None:
        self._answer, self._random = answer, random.Random(seed)
        self._waiting: list[tuple[int, EnvironmentReply]] = []
        self.asked: list[EnvironmentRequest] = []

    def submit(self, key: int, request: EnvironmentRequest) -> None:
        self.asked.append(request)
        self._waiting.append((key, self._answer(request)))

    def poll(self, timeout_s: float) -> list[tuple[int, EnvironmentReply]]:
        if not self._waiting:
            return []
        return [self._waiting.pop(self._random.randrange(len(self._waiting)))]


def text_of(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def ids_of(reply: Sequence[Message], last: int) -> list[int]:
    """A token for each word of a reply, and the last one of the turn before, so that it shows where it belongs."""
    return [last, *(int(word) for message in reply for word in message["content"].split())]


def dialogues_of(environment: Environment, max_turns: int = 4) -> Dialogues:
    return Dialogues(environment, ids_of, text_of, max_turns=max_turns)


def counting(turns: int) -> Answer:
    """Goes on until the model's turn `turns`, with the number of its words so far, and ends it earlier after an odd token."""

    def answer(request: EnvironmentRequest) -> EnvironmentReply:
        said = [message["content"].split() for message in request.messages if message["role"] == "assistant"]
        if len(said) == turns or int(said[-1][-1]) % 2:
            return ENDS
        return says(f"{sum(map(len, said))} 11")

    return answer


def dialogues(
    model, prompts, temperature, samples, max_tokens, stop_ids, turns, max_turns=4, routing=False
) -> list[list[dict]]:
    """Every sample of a round of dialogues with the embedded engine, on this rank."""
    sampling = Sampling(samples, max_tokens, temperature, seed=3, step=2, routing=routing)
    engine, problems = _engine(model, list(stop_ids)), _problems(prompts)
    groups = generate_groups(engine, problems, sampling)
    own = dialogues_of(Environment(counting(turns)), max_turns) if dist.get_rank() == 0 else None
    draw_further_turns(engine, groups, sampling, own)
    return [[asdict(sample) for sample in group.samples] for group in groups]
