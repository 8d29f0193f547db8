"""Replies to `/generate`: a long one is parsed as a short one is, and what is wrong with it is noticed."""

from __future__ import annotations

import base64
import json
from array import array

import numpy as np
import pytest

from etr_megatron.rollout.sglang import replies
from etr_megatron.rollout.sglang.replies import OtherTokensError, read_generated

TOKENS = 1300
COMPACT = (",", ":")  # as SGLang writes JSON


def meta_of(tokens: int = TOKENS, **more):
    """Log-probs are float32, as SGLang's are, from one that rounds to 0 in float16 to one that is not printed in full."""
    draw = np.random.default_rng(tokens)
    ids = draw.integers(0, 150_000, tokens).tolist()
    logprobs = (-draw.exponential(size=tokens) * 10.0 ** draw.integers(-12, 2, tokens)).astype(np.float32).tolist()
    logprobs[:2] = [0.0, -1e-38]
    pairs = [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
    return {"finish_reason": {"type": "stop", "matched": 2}, "weight_version": "7", "output_token_logprobs": pairs, **more}


def reply_of(meta, separators=COMPACT, ids=None, **more) -> bytes:
    ids = [pair[1] for pair in meta["output_token_logprobs"]] if ids is None else ids
    return json.dumps({"output_ids": ids, "meta_info": meta, **more}, separators=separators).encode()


@pytest.mark.parametrize("separators", [COMPACT, (", ", ": ")])
def test_a_long_reply_has_the_numbers_of_its_json(separators):
    experts = np.random.default_rng(1).integers(0, 256, 3 * TOKENS, np.int32)
    meta = meta_of(routed_experts=base64.b64encode(experts.tobytes()).decode())
    said = (
        '"output_ids":[1,2],"output_token_logprobs":[[-1.0,3,null]],"routed_experts":"AAAA"'  # generated text like the reply's
    )
    reply = reply_of(meta, separators, text=said)
    assert len(reply) > replies._LONG
    found = read_generated(reply, routing=True)
    assert (found.ids.typecode, found.logprobs.typecode, found.routing.typecode) == ("i", "d", "B")
    assert found.ids.tolist() == [pair[1] for pair in meta["output_token_logprobs"]]
    assert found.logprobs.tolist() == [pair[0] for pair in meta["output_token_logprobs"]]
    assert found.routing.tolist() == experts.tolist()
    assert (found.finish_reason, found.version) == ("stop", "7")


def test_a_long_reply_is_parsed_without_an_object_for_every_token(monkeypatch):
    parsed = []
    monkeypatch.setattr(json, "loads", lambda text, loads=json.loads: parsed.append(text) or loads(text))
    read_generated(reply_of(meta_of()), routing=False)
    assert len(parsed[0]) < 200 and b'"output_ids":null' in parsed[0]


def test_the_order_of_a_replys_keys_does_not_matter():
    ids = [pair[1] for pair in meta_of()["output_token_logprobs"]]
    reply = {"meta_info": dict(reversed(meta_of().items())), "output_ids": ids}
    found = read_generated(json.dumps(reply, separators=COMPACT).encode(), routing=False)
    assert found == read_generated(reply_of(meta_of()), routing=False)


@pytest.mark.parametrize("tokens", [3, TOKENS])
def test_what_is_wrong_with_a_reply_is_noticed(tokens):
    def fails_with(error, reply: bytes, routing: bool = False) -> None:
        with pytest.raises(error):
            read_generated(reply, routing=routing)

    meta = meta_of(tokens)
    pairs = meta["output_token_logprobs"]
    others = [*pairs[:-1], [pairs[-1][0], pairs[-1][1] + 1, None]]
    ids = [pair[1] for pair in pairs]
    for wrong in (others, pairs[:-1], [*pairs, pairs[-1]]):
        fails_with(OtherTokensError, reply_of({**meta, "output_token_logprobs": wrong}, ids=ids))
    wrongs = (TypeError, ValueError, IndexError, KeyError, OverflowError)
    for wrong in ([None, 5, None], ["-1.0", 5, None], [-1.0], [-1.0, 5.5, None], [-1.0, 2**31, None]):
        fails_with(
            wrongs, reply_of(meta).replace(json.dumps(pairs[1], separators=COMPACT).encode(), json.dumps(wrong).encode())
        )
    fails_with(wrongs, reply_of(meta)[:-20])
    fails_with(wrongs, reply_of(meta).replace(b'"stop"', b'"paused"'))
    fails_with(KeyError, reply_of(meta), routing=True)
    for wrong in ("A" * 40_001, "A" * 39_999 + "!", "A" * 39_999 + "="):  # the last is three bytes short of an int32
        fails_with(ValueError, reply_of({**meta, "routed_experts": wrong}), routing=True)


def test_an_aborted_request_may_have_no_log_probs_and_no_experts():
    meta = {"finish_reason": {"type": "abort"}, "weight_version": None, "note": "x" * replies._LONG}
    found = read_generated(json.dumps({"output_ids": [], "meta_info": meta}, separators=COMPACT).encode(), routing=True)
    assert (found.ids, found.logprobs, found.routing, found.version) == (array("i"), array("d"), array("B"), "None")
