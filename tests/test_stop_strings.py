"""Texts that end a turn: where they end in tokens, in the embedded engine, and with servers that do not see them."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from etr_megatron.config import SglangConfig
from etr_megatron.rollout import Sampling
from etr_megatron.rollout.sglang.client import GenerateParameters
from etr_megatron.rollout.sglang.commands import server_command
from etr_megatron.rollout.stops import NO_STOP_STRINGS, StopStrings
from tests.fake_servers import servers
from tests.stop_jobs import bpe, letters
from tests.test_rollout import PROMPTS
from tests.test_sglang_engine import OWN
from tests.test_sglang_fits import expected

GONE = "\N{REPLACEMENT CHARACTER}"


def cut(ids: list[int], texts: list[str]) -> int | None:
    """The rule itself: the first number of tokens whose text contains one of these."""
    return next((n for n in range(1, len(ids) + 1) if any(text in bpe().decode(ids[:n]) for text in texts)), None)


def test_a_turn_ends_with_the_token_in_which_a_text_ends_wherever_it_begins():
    rng = random.Random(5)
    found = 0
    for _ in range(300):
        ids = [rng.randrange(301) for _ in range(rng.randrange(1, 40))]
        text = bpe().decode(ids)
        texts = []
        for _ in range(rng.randrange(1, 4)):
            begin = rng.randrange(len(text))
            texts.append(text[begin : begin + rng.randrange(1, 12)])
        if GONE in "".join(texts):
            continue
        stops, end = StopStrings(texts, bpe().decode), cut(ids, texts)
        found += 1
        assert end is not None and stops.end(ids) == end
        assert [stops.end_with(ids[:n]) for n in range(1, end + 1)] == [False] * (end - 1) + [True]
        for begin in range(end):
            assert stops.end(ids, begin) == end
        assert stops.end(ids[: end - 1]) is None and stops.end(ids, len(ids)) is None
    assert found > 150


@pytest.mark.parametrize("text", ["</search>", "日本", "é"])
def test_a_text_is_found_however_many_tokens_it_is_cut_into(text):
    """A server looks at one token more than the tokenizer makes of it."""
    whole = bpe().encode(text, add_special_tokens=False)
    letter_ids = [token for byte in text.encode() for token in [bpe().convert_tokens_to_ids(byte_name(byte))]]
    assert len(letter_ids) == len(text.encode()) > len(whole)
    stops = StopStrings([text], bpe().decode)
    for ids in (whole, letter_ids):
        ids = [*[100] * 20, *ids]
        assert stops.end([*ids, 7, 7]) == len(ids) and stops.end_with(ids) and not stops.end_with(ids[:-1])


def byte_name(byte: int) -> str:
    """A byte in the alphabet of byte-level BPEs."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()[byte]


def test_special_tokens_are_text():
    stops = StopStrings(["h><|end|>"], bpe().decode)
    (end,) = bpe().convert_tokens_to_ids(["<|end|>"])
    ids = [*bpe().encode("</search>", add_special_tokens=False), end]
    assert stops.end([*ids, 5]) == len(ids)


def test_without_texts_nothing_is_decoded():
    def fails(ids: list[int]) -> str:
        raise AssertionError

    for stops in (NO_STOP_STRINGS, StopStrings((), fails)):
        assert not stops and not stops.end_with([1]) and stops.end([1, 2]) is None


def test_an_embedded_response_ends_with_the_text_and_has_the_same_numbers(gangs, hf_models):
    job = dict(model=hf_models["qwen3"], prompts=PROMPTS, sampling=Sampling(3, 24, 0.9, seed=3, step=2))
    (free,) = gangs(1).run("tests.stop_jobs:embedded", **job)
    (same,) = gangs(1).run("tests.stop_jobs:embedded", texts=["no such text"], **job)
    assert same == free
    texts = [inner_text(free[0][1]["response_ids"].tolist()), inner_text(free[2][0]["response_ids"].tolist())]
    for replies in gangs(2).run("tests.stop_jobs:embedded", texts=texts, **job):
        ends = [
            check_cut(before, after, texts)
            for many in zip(free, replies, strict=True)
            for before, after in zip(*many, strict=True)
        ]
        assert ends.count("stop") >= 2 and "length" in ends


def inner_text(ids: list[int]) -> str:
    """A text in the middle of these tokens that begins and ends within tokens if possible."""
    for begin in range(3, len(ids) - 6):
        first, last = bpe().decode(ids[begin : begin + 1]), bpe().decode(ids[begin + 2 : begin + 3])
        text = bpe().decode(ids[begin : begin + 3])
        if GONE not in text and len(first) > 1 and len(last) > 1:
            return text[1:-1]
    raise AssertionError("no text")


def check_cut(before: dict, after: dict, texts: list[str]) -> str:
    """`after` is `before` up to its first stop string; returns its finish reason."""
    ids = before["response_ids"].tolist()
    end = cut(ids, texts)
    assert after["response_ids"].tolist() == ids[:end]
    assert after["rollout_logprobs"].tolist() == pytest.approx(before["rollout_logprobs"].tolist()[:end], abs=1e-5)
    assert after["finish_reason"] == ("length" if end is None else "stop")
    return after["finish_reason"]


def test_a_response_in_which_a_server_missed_the_text_ends_there(gangs, hf_models, tmp_path):
    """Tokens, log-probs and experts; all ranks hear the same. These servers know nothing of stop strings."""
    prompts, sampling = [[3, 7], [60, 8]], Sampling(2, 9, 1.0, seed=1, step=1, routing=True)
    texts = [letters([12, 13]), letters([75])]
    with servers({}) as urls:
        job = dict(model=hf_models["qwen3_moe"], directory=str(tmp_path), prompts=prompts, urls=urls)
        mine, others = gangs(2).run("tests.stop_jobs:from_fakes", texts=texts, sampling=sampling, **job)
    for (prompt, group), other, count in zip(zip(prompts, mine, strict=True), others, (4, 8), strict=True):
        ids = [sum(prompt) + i for i in range(count)]
        for one, elsewhere in zip(group, other, strict=True):
            assert one["response_ids"].tolist() == ids and one["rollout_logprobs"].tolist() == [-0.5] * count
            assert one["routing"].tolist() == [n for token in [*prompt, *ids][:-1] for n in (token % 4, 4 + token % 3)]
            assert one["finish_reason"] == elsewhere["finish_reason"] == "stop" and not elsewhere["response_ids"]


@pytest.mark.parametrize(
    ("texts", "turn_begin", "limit", "pause", "ids", "finish"),
    [
        ([[12, 13]], 0, 40, 5, [13], "stop"),  # begins in the tokens that were drawn before the response was cut off
        ([[12, 13]], 2, 40, 5, [13, 14, 15, 16, 17], "abort"),  # these belong to the turn before
        ([[17]], 0, 40, 5, [13, 14, 15, 16, 17], "stop"),  # cut off exactly where it ends
        ([[16, 17]], 0, 7, None, [13, 14, 15, 16, 17], "stop"),  # at the limit
        ([[17, 18]], 0, 7, None, [13, 14, 15, 16, 17], "length"),
    ],
)
def test_a_response_that_was_cut_off_is_continued_to_its_first_stop_string(
    gangs, hf_models, tmp_path, texts, turn_begin, limit, pause, ids, finish
):
    with servers({"tokens_per_s": 400, "pause_at": pause}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), urls=urls, drawn=[11, 12], turn_begin=turn_begin)
        (found,) = gangs(1).run(
            "tests.stop_jobs:continued", texts=[letters(one) for one in texts], limit=limit, pauses=pause is not None, **job
        )
    assert list(found["ids"]) == ids and found["finish_reason"] == finish
    assert list(found["logprobs"]) == [-0.5] * len(ids)


@pytest.mark.parametrize("texts", [["x"], []])
def test_the_jobs_servers_have_a_tokenizer_only_if_there_are_texts(gangs, hf_models, tmp_path, texts):
    """A fake server without one refuses them, as SGLang does."""
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), prompts=[[3]], texts=texts, **OWN)
    (((one,),),) = gangs(1).run("tests.stop_jobs:from_fakes", sampling=Sampling(1, 4, 1.0, seed=1, step=1), **job)
    assert one["response_ids"].tolist() == [3, 4, 5, 6]
    where = dict(place=0, host="h", folder=tmp_path, api_key=None, cuda=False, tokenizer=bool(texts))
    assert ("--skip-tokenizer-init" in server_command(SglangConfig(), tmp_path, "bfloat16", **where).arguments) == (not texts)


def test_a_request_names_the_texts_and_a_pattern_as_long_as_the_longest():
    parameters = GenerateParameters(5, 1.0, 1.0, 0, seed=1, stop_ids=(2,))
    assert not {"stop", "stop_regex"} & parameters.as_json().keys()
    body = replace(parameters, stop_strings=("</a>", "a.b\n+c")).as_json()
    assert body["stop"] == ["</a>", "a.b\n+c"] and body["stop_regex"] == ["a\\.b\\\n\\+c"]
    assert body == parameters.as_json() | {name: body[name] for name in ("stop", "stop_regex")}
    assert "stop_regex" not in replace(parameters, stop_strings=("a" * 257,)).as_json()
    json.dumps(body)


def test_a_server_without_a_tokenizer_is_refused_where_there_are_texts(gangs, hf_models, tmp_path):
    job, server = replace(expected(hf_models), tokenizer=True), {"skip_tokenizer_init": True}
    why = "it was started with --skip-tokenizer-init, so it cannot match the texts of rollout.stop_strings"
    assert job.misfit(server, {}) == why and expected(hf_models).misfit(server, {}) is None
    assert job.misfit({"skip_tokenizer_init": False}, {}) is None and job.misfit({}, {}) is None
    with servers({}, {"says": {"/server_info": server}}) as urls:
        job = dict(model=hf_models["qwen3"], directory=str(tmp_path), urls=urls)
        (error,) = gangs(1).run("tests.sglang_jobs:refused", stop_strings=StopStrings(["x"], letters), **job)
    assert error == f"UserError: SGLang server 1 at {urls[1]} cannot take the job's weights: {why}"
