"""The workload of a step: numbers of samples, tokens and microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from etr_megatron.config import Config
from etr_megatron.config.schema.fp8 import FP8_TOKENS
from etr_megatron.planner.cluster import Cluster


@dataclass(frozen=True)
class Workload:
    """prompt, response: mean tokens of a sample. longest: maximum tokens of a sample.

    microbatch_tokens: maximum tokens of a microbatch with padding, over all context-parallel ranks.
    microbatches: per data-parallel rank and optimizer step, at mean lengths. most_microbatches: if all samples are longest.
    """

    samples: int
    prompt: float
    response: float
    longest: int
    microbatch_tokens: int
    microbatches: int
    most_microbatches: int

    @property
    def tokens(self) -> float:
        """Tokens of a step, including prompts."""
        return self.samples * (self.prompt + self.response)


def workload_of(config: Config, cluster: Cluster, prompt: float | None = None, response: float | None = None) -> Workload:
    """The workload of a resolved config. prompt, response: mean tokens; None assumes a quarter of `data.max_prompt_tokens` and
    half of `rollout.max_response_tokens`."""
    parallel, rollout, train = config.parallel, config.rollout, config.train
    assert parallel.tp != "auto"
    prompt = config.data.max_prompt_tokens / 4 if prompt is None else prompt
    response = rollout.max_response_tokens / 2 if response is None else response
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    multiple = FP8_TOKENS[config.fp8.recipe] * (parallel.tp if parallel.sequence_parallel else 1) * parallel.cp
    largest = max(train.tokens_per_microbatch, longest)  # a sample longer than the budget is its own microbatch
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    replicas = cluster.ranks // (parallel.tp * parallel.pp * parallel.cp)
    of_a_rank = samples / train.minibatches / replicas

    def microbatches(tokens: float) -> int:
        # A microbatch holds whole samples, and the interleaved schedule runs microbatches in rounds of one per stage.
        fits = max(1, int(train.tokens_per_microbatch // tokens))
        count, round_of = max(1, ceil(of_a_rank / fits)), parallel.pp if parallel.vpp > 1 else 1
        return -(-count // round_of) * round_of

    return Workload(
        samples=samples,
        prompt=prompt,
        response=response,
        longest=longest,
        microbatch_tokens=-(-largest // multiple) * multiple,
        microbatches=microbatches(prompt + response),
        most_microbatches=microbatches(longest),
    )
