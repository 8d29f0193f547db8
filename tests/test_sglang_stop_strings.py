"""Texts that end a turn at a real SGLang server on CPU (see tests/test_sglang_server.py): it says the same as the embedded
engine, which finds them by itself."""

from __future__ import annotations

import pytest

from etr_megatron.rollout import Sampling
from tests.stop_jobs import SPELLED, bpe
from tests.test_sglang_server import OWN, PROMPTS, PYTHON, model, pytestmark  # noqa: F401
from tests.test_stop_strings import check_cut, inner_text
from tests.warm_servers import real_in_gangs


def test_a_server_ends_a_response_where_the_embedded_engine_does(gangs, model, tmp_path):  # noqa: F811
    bpe().save_pretrained(model)
    job = dict(model=model, prompts=PROMPTS, sampling=Sampling(1, 32, 0.0, seed=3, step=2))
    (free,) = gangs(1).run("tests.stop_jobs:embedded", **job)
    texts = [inner_text(group[0]["response_ids"].tolist()) for group in free[:2]]
    (wanted,) = gangs(1).run("tests.stop_jobs:embedded", texts=texts, **job)
    job |= dict(texts=texts, directory=str(tmp_path), deadline_s=1500.0, **OWN, **real_in_gangs(str(PYTHON)))
    (found,) = gangs(1).run("tests.stop_jobs:served", **job)
    for (before,), (mine,), (one,), rest in zip(free, wanted, found["samples"], found["rest"], strict=True):
        check_cut(before, one, texts)
        assert one["response_ids"] == mine["response_ids"] and one["finish_reason"] == mine["finish_reason"]
        assert one["rollout_logprobs"].tolist() == pytest.approx(mine["rollout_logprobs"].tolist(), abs=1e-5)
        assert rest["ids"] == one["response_ids"][-1:] and rest["finish_reason"] == one["finish_reason"]
        assert rest["logprobs"].tolist() == pytest.approx(one["rollout_logprobs"].tolist()[-1:], abs=1e-5)
    whole, seen, missed = ((one["output_ids"], one["meta_info"]) for one in found["spelled"])
    ids = whole[0]
    assert len(bpe().encode(SPELLED, add_special_tokens=False)) < 6 and len(ids) == 32 and len(set(ids)) == 1
    assert missed[0] == ids and missed[1]["finish_reason"]["type"] == "length"  # why requests have a pattern
    assert seen[0] == ids[:12] and seen[1]["finish_reason"] == {"type": "stop", "matched": SPELLED}
    assert [token for _, token, _ in seen[1]["output_token_logprobs"]] == ids[:12]
