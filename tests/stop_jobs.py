"""Stop strings: a byte-level BPE for models that draw at random, and jobs that gang ranks run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from etr_megatron.rollout import Sampling
from etr_megatron.rollout.embedded import EmbeddedEngine
from etr_megatron.rollout.engine import GenerationOutput, GenerationRequest
from etr_megatron.rollout.sglang.client import GenerateParameters, ServerClient
from etr_megatron.rollout.stops import StopStrings
from etr_megatron.types import Problem
from tests.policy_jobs import build
from tests.sglang_jobs import TEMPERATURE, engine_of, generated, states_of

WORDS = [f"{a}{b}{c}" for a in " smtl" for b in "aeiou" for c in "thrnd"] + ["</search>", "café", "7€", "z" * 8, "日本", "über"]
SPELLED = "z" * 12
"""A text of three tokens that may be drawn as twelve."""


@cache
def bpe(tokens: int = 301) -> PreTrainedTokenizerFast:
    """A BPE with this many tokens. Most are several letters, so that also what is drawn at random is text; a letter that is not
    ASCII may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=tokens, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator([f"{one}{other}" for one in WORDS for other in WORDS], trainer)
    assert tokenizer.get_vocab_size() == tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", clean_up_tokenization_spaces=False)


def problems_of(prompts: Sequence[Sequence[int]]) -> list[Problem]:
    return [Problem(f"p{i}", "", "", list(ids)) for i, ids in enumerate(prompts)]


def embedded(model: str, prompts: Sequence[Sequence[int]], sampling: Sampling, texts: Sequence[str] = ()) -> list[list[dict]]:
    """Responses of the embedded engine with the weights of the model's own file."""
    options = dict(dtype=torch.float32, device=torch.device("cpu"), batch_samples=4, stop_ids=[])
    engine = EmbeddedEngine(model, **options, stop_strings=StopStrings(texts, bpe().decode))
    engine.update_weights(load_file(f"{model}/model.safetensors").items(), version=0)
    return [[asdict(one) for one in some] for some in engine.generate(problems_of(prompts), sampling)]


def served(
    model: str, directory: str, prompts: Sequence[Sequence[int]], sampling: Sampling, texts: Sequence[str], **settings: Any
) -> dict[str, Any]:
    """Responses of a real server after a sync; what it draws after all but their last token, as if they had been cut off there;
    and its whole replies when it must draw single letters, see `_spelled`."""
    policy = build(model, [f"rollout.temperature={TEMPERATURE}"])
    stops = StopStrings(texts, bpe().decode)
    engine = engine_of(policy, model, directory, probe_every=1, stop_strings=stops, **settings)
    try:
        engine.update_weights(policy.export(), version=1)
        groups = generated(engine, prompts, sampling)
        problems = problems_of(prompts)
        engine.submit(
            [
                GenerationRequest(number, problem, 0, sampling, group[0].response_ids[:-1])
                for number, (problem, group) in enumerate(zip(problems, groups, strict=True))
            ]
        )
        rest: list[GenerationOutput] = []
        while len(rest) < len(problems):
            rest += engine.wait(60.0)
        (client,) = engine._control.fleet.clients
        return {
            "samples": [[asdict(one) for one in some] for some in groups],
            "rest": [asdict(one) for one in sorted(rest, key=lambda one: one.key)],
            "spelled": engine._control.run(_spelled(client, prompts[0], sampling.max_tokens)),
        }
    finally:
        engine.close()


async def _spelled(client: ServerClient, prompt: Sequence[int], tokens: int) -> list[dict[str, Any]]:
    """Replies to a prompt whose responses are one letter again and again: without stop strings, with SPELLED, and with that but
    without a pattern."""
    (letter,) = set(bpe().convert_tokens_to_ids(list(SPELLED)))
    parameters, replies = GenerateParameters(tokens, 0.0, 1.0, 0, seed=1, stop_ids=(), ignore_eos=True), []
    for texts, without in ([], ()), ([SPELLED], ()), ([SPELLED], ("stop_regex",)):
        sampling = replace(parameters, stop_strings=texts).as_json() | {"logit_bias": {str(letter): 100.0}}
        body = {"input_ids": list(prompt), "return_logprob": True, "logprob_start_len": -1}
        body["sampling_params"] = {name: value for name, value in sampling.items() if name not in without}
        replies.append(await client.call("/generate", body, timeout_s=300.0))
    return replies


def letters(ids: list[int]) -> str:
    """For fake servers: every token is a letter."""
    return "".join(chr(0x4E00 + token) for token in ids)


def from_fakes(
    model: str, directory: str, prompts: Sequence[Sequence[int]], sampling: Sampling, texts: Sequence[str], **settings: Any
) -> list[list[dict]]:
    """Responses on every rank, as the engine itself gives them to each."""
    policy = build(model, [])
    stops = StopStrings(texts, letters)
    engine = engine_of(policy, model, directory, probe_every=0, stop_strings=stops, routing=sampling.routing, **settings)
    try:
        engine.update_weights(policy.export(), version=1)
        return [[asdict(one) for one in some] for some in engine.generate(problems_of(prompts), sampling)]
    finally:
        with suppress(RuntimeError):
            dist.barrier()
        engine.close()


def continued(
    model: str,
    directory: str,
    texts: Sequence[str],
    drawn: Sequence[int],
    turn_begin: int,
    limit: int,
    pauses: bool,
    **settings: Any,
) -> dict:
    """What follows `drawn` at a fake server; it is cut off where the server waits, if it does."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, probe_every=0, stop_strings=StopStrings(texts, letters), **settings)
    try:
        engine.update_weights(policy.export(), version=1)
        draw = GenerationRequest(
            0, Problem("p", "", "", [3, 4]), 0, Sampling(1, limit, 1.0, 1, 1, routing=False), drawn, turn_begin
        )
        engine.submit([draw])
        while pauses and not states_of(engine)["SGLang server 0"]["waiting"]:
            time.sleep(0.02)
        (found,) = engine.stop(abort=True) if pauses else engine.wait(600.0)
        return asdict(found)
    finally:
        engine.close()
