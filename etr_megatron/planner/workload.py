"""What a step has to process: numbers of samples, tokens and microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from etr_megatron.config import Config
from etr_megatron.config.schema.fp8 import FP8_TOKENS
from etr_megatron.planner.cluster import Cluster


@dataclass(frozen=True)
class Workload:
    """prompt, response: mean tokens of a sample. longest: most tokens of a sample.

    microbatch_tokens: most tokens of a microbatch, padded, of all context-parallel ranks together.
    microbatches: of a data-parallel rank in an optimizer step, at mean lengths. most_microbatches: when all are longest.
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
        """Of a step, prompts included."""
        return self.samples * (self.prompt + self.response)


def workload_of(config: Config, cluster: Cluster, prompt: float | None = None, response: float | None = None) -> Workload:
    """From a resolved config. prompt, response: mean tokens; None is assumed to be a quarter of `data.max_prompt_tokens` and
    half of `rollout.max_response_tokens`."""
    parallel, rollout, train = config.parallel, config.rollout, config.train
    assert parallel.tp != "auto"
    prompt = config.data.max_prompt_tokens / 4 if prompt is None else prompt
    response = rollout.max_response_tokens / 2 if response is None else response
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    multiple = FP8_TOKENS[config.fp8.recipe] * (parallel.tp if parallel.sequence_parallel else 1) * parallel.cp
    largest = max(train.tokens_per_microbatch, longest)  # a sample that is longer than the budget is a microbatch of its own
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    replicas = cluster.ranks // (parallel.tp * parallel.pp * parallel.cp)
    of_a_rank = samples / train.minibatches / replicas

    def microbatches(tokens: float) -> int:
        # A microbatch is filled with whole samples, and the interleaved schedule works in rounds of one for every stage.
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
