"""Clients that have a server generate a step for the rollout benchmark: this project's whole path, and bare loops."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch.distributed as dist

from benchmarks.reshard_problem import QUICK_DENSE
from etr_megatron.config import Config, SglangConfig
from etr_megatron.config.schema import ArithmeticConfig, RolloutConfig, RunConfig, TinyConfig
from etr_megatron.data import PromptCursor
from etr_megatron.data.warm_start import train_tokenizer
from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout import StreamingSampler, sample_seed
from etr_megatron.rollout.collect import Decode
from etr_megatron.rollout.sampler import sampling_of
from etr_megatron.rollout.sglang import Serving, SglangEngine
from etr_megatron.rollout.sglang.client import GenerateParameters
from etr_megatron.rollout.sglang.connections import Connections
from etr_megatron.types import Problem
from etr_megatron.weights import read_architecture

STEPS = 10_000
"""Steps of the run in the config; more than any measurement runs."""


@dataclass(frozen=True)
class Shape:
    """A step: `prompts` groups of `samples` responses of at most `tokens` tokens, `concurrency` of them under way."""

    prompts: int
    samples: int
    tokens: int
    concurrency: int = 128

    @property
    def requests(self) -> int:
        """Requests per step."""
        return self.prompts * self.samples


class Contestant(Protocol):
    """Has a step's responses generated and returns their number of tokens."""

    def run(self, step: int) -> int:
        """Run a step, numbered from 1; its requests are the same for every contestant."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


class _Problems(list[Problem]):
    fingerprint = "benchmark"


def make_problems(shape: Shape, steps: int, prompt_tokens: int, vocabulary: int) -> list[Problem]:
    """Distinct prompts for this many steps, in the order of use."""
    draw = random.Random(1)
    return _Problems(
        Problem(f"p{number}", "", "", [draw.randrange(3, vocabulary) for _ in range(prompt_tokens)])
        for number in range(shape.prompts * steps)
    )


def config_of(shape: Shape, url: str, **rollout: Any) -> Config:
    """The config of etr_megatron. rollout: more settings of that section."""
    sizes = dict(prompts_per_step=shape.prompts, samples_per_prompt=shape.samples, max_response_tokens=shape.tokens)
    return Config(
        run=RunConfig(steps=STEPS),
        rollout=RolloutConfig(**sizes, **rollout, backend="sglang"),
        sglang=SglangConfig(urls=(url,), concurrency=shape.concurrency, probe_every=0),
    )


def tokenizer_of(tiny: TinyConfig | None = None) -> Any:
    """The tiny policy's tokenizer; its `decode` turns responses into the text to be graded."""
    return train_tokenizer(tiny or TinyConfig(), ArithmeticConfig())


class _Graders:
    """Stands in for a `GraderPool`, whose processes are not measured: rewards alternate between 0 and 1."""

    def __init__(self) -> None:
        self._keys = itertools.count()

    def submit(self, requests: Sequence[GradeRequest]) -> list[int]:
        return list(itertools.islice(self._keys, len(requests)))

    def poll(self, keys: AbstractSet[int], timeout_s: float) -> dict[int, Grade]:
        return {key: Grade(float(key % 2), "ok", "") for key in [*keys]}


class Sampled:
    """Sampler, fleet, client: what the trainer calls, up to complete groups with their texts. The world has one rank."""

    def __init__(self, config: Config, problems: list[Problem], decode: Decode, directory: Path) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        # There is no weight sync. A real server's model is described by a config.json; a server without a model has none.
        architecture = read_architecture(directory) if (directory / "config.json").exists() else QUICK_DENSE
        serving = Serving(architecture, "float32", "gloo", [], directory, temperature=1.0, max_gap=1.0)
        self.engine = SglangEngine(config.sglang, directory, serving)
        cursor = PromptCursor(problems, seed=1, shuffle=False)
        self.sampler = StreamingSampler(config, self.engine, cursor, decode, _Graders())

    def run(self, step: int) -> int:
        """See `Contestant.run`."""
        groups = self.sampler.take(step, lambda _phase: nullcontext()).groups
        return sum(len(sample.response_ids) for group in groups for sample in group.samples)

    def close(self) -> None:
        """See `Contestant.close`."""
        self.engine.close()
        dist.destroy_process_group()


class BareLoop:
    """Only asyncio and httpx: the same requests, with the same concurrency, over persistent connections.

    transport: used instead of httpx's own.
    """

    def __init__(self, config: Config, problems: Sequence[Problem], transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._config, self._problems = config, problems
        self._url, self._gate = f"{config.sglang.urls[0]}/generate", asyncio.Semaphore(config.sglang.concurrency)
        self._runner = asyncio.Runner()
        # SGLang closes connections idle for 5 s; if httpx reuses one at that moment, the request fails.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        self._http = httpx.AsyncClient(limits=limits, timeout=600.0, transport=transport)

    def run(self, step: int) -> int:
        """See `Contestant.run`."""
        return self._runner.run(self._all(self.bodies(step)))

    def bodies(self, step: int) -> list[dict[str, Any]]:
        """The requests that the sampler sends for a step."""
        sampling, count = sampling_of(self._config, step), self._config.rollout.prompts_per_step
        found = []
        for problem in self._problems[(step - 1) * count : step * count]:
            for index in range(sampling.samples):
                seed = sample_seed(sampling, problem, index)
                parameters = GenerateParameters(
                    sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, seed, ()
                )
                whole = {"return_logprob": True, "logprob_start_len": -1}
                found.append({"input_ids": problem.prompt_ids.tolist(), "sampling_params": parameters.as_json(), **whole})
        return found

    async def _all(self, bodies: list[dict[str, Any]]) -> int:
        async def one(body: dict[str, Any]) -> int:
            async with self._gate:
                reply = await self._http.post(self._url, json=body)
            return len(reply.raise_for_status().json()["output_ids"])

        return sum(await asyncio.gather(*map(one, bodies)))

    def close(self) -> None:
        """See `Contestant.close`."""
        self._runner.run(self._http.aclose())
        self._runner.close()


def contestants(shape: Shape, url: str, problems: list[Problem], decode: Decode, directory: Path) -> dict[str, Contestant]:
    """All contestants, on the same server."""
    config = config_of(shape, url)
    return {
        "sampler": Sampled(config, problems, decode, directory),
        "bare_loop": BareLoop(config, problems),
        "bare_connections": BareLoop(config, problems, Connections()),
    }
