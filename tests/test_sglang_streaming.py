"""The path from training to servers: groups pending, requests one by one, servers that are lost and come back."""

from __future__ import annotations

from array import array

import pytest

from tests.test_sglang_engine import OWN

STEPS, PER_STEP, TOKENS = 5, 4, 24
PARTIAL = {"partial": True, "max_staleness": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rollout"),
    [("die_in", {}), ("stop_in", PARTIAL)],
    ids=["dies, synchronous", "hangs, partial rollouts one step ahead"],
)
def test_a_server_that_is_lost_costs_no_sample_and_serves_again_with_the_weights(gangs, hf_models, tmp_path, how, rollout):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), how=how, steps=STEPS, hang_timeout_s=3.0, **OWN)
    sizes = dict(prompts_per_step=PER_STEP, max_response_tokens=TOKENS)
    (found,) = gangs(1).run("tests.sglang_stream_jobs:lost_while_streaming", rollout=rollout | sizes, **job)
    groups = [group for step in found["steps"] for group in step]
    assert [len(step) for step in found["steps"]] == [PER_STEP] * STEPS
    assert len({group["id"] for group in groups}) == STEPS * PER_STEP  # none lost or duplicated
    for group in groups:
        assert [one["index"] for one in group["samples"]] == [0, 1]
        last = group["problem"]["prompt_ids"][-1]
        for one in group["samples"]:  # complete, whichever servers its parts come from
            assert one["response_ids"].tolist() == [(last + 1 + i) % 97 for i in range(TOKENS)]
    assert any("SGLang server 0" in failed for failed in found["failed"]) and not found["failed"][-1]
    again = found["states"]["SGLang server 0"]
    assert again["pid"] != found["pid"] and again["prompts"]
    assert all(version.isdigit() for version in again["prompt_versions"])  # of a sync, not the version at start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("servers", "gone", "rollout"),
    [(1, 2, {}), (3, 0, {}), (2, 0, PARTIAL)],
    ids=["1, synchronous", "3, synchronous", "2, partial rollouts one step ahead"],
)
def test_a_prompt_that_no_server_survives_is_given_up_and_the_run_goes_on(gangs, hf_models, tmp_path, servers, gone, rollout):
    """A single server is lost twice, but not a third time after the job is restarted."""
    sizes = dict(prompts_per_step=PER_STEP, max_response_tokens=5, samples_per_prompt=3)
    steps = 6 if rollout else 3  # ahead, groups may stay pending while others are ready
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), steps=steps, servers=servers, concurrency=8, **OWN)
    job |= dict(trains_long=bool(rollout))
    (found,) = gangs(1).run("tests.sglang_stream_jobs:poisoned", poison=2, rollout=rollout | sizes, **job)
    assert found["gone"] == gone
    groups = [group for step, _, _ in found["steps"] for group in step]
    names = [group["problem"]["id"] for group in groups]
    assert len(set(names)) == len(names) == steps * PER_STEP and "p2" not in names
    assert {"p0", "p1", "p3"} < set(names)  # its neighbours are not blamed
    for group in groups:
        tokens = [(sum(group["problem"]["prompt_ids"]) + i) % 97 for i in range(5)]
        assert [one["response_ids"].tolist() for one in group["samples"]] == [tokens] * 3
    assert sum(counts.get("groups_given_up", 0) for _, counts, _ in found["steps"]) == 1
    assert len(found["steps"][0][2]) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rollout", "placement"),
    [({}, "dedicated"), (PARTIAL, "colocated")],
    ids=["synchronous", "partial rollouts one step ahead, colocated"],
)
def test_samples_have_the_experts_of_all_their_tokens_also_where_they_were_continued(
    gangs, hf_models, tmp_path, rollout, placement
):
    sizes = dict(prompts_per_step=2, max_response_tokens=TOKENS)
    job = dict(model=hf_models["qwen3_moe"], directory=str(tmp_path), steps=3, placement=placement, **OWN)
    steps, others = gangs(2).run("tests.sglang_stream_jobs:routed", rollout=rollout | sizes, **job)
    found = [(group["problem"]["prompt_ids"], one) for step in steps for group in step for one in group["samples"]]
    assert len(found) == 3 * 2 * 2
    for prompt, one in found:
        tokens = [*prompt, *one["response_ids"]]
        assert one["routing"].tolist() == [number for token in tokens[:-1] for number in (token % 4, 4 + token % 3)]
    assert any(one["weight_versions"] for _, one in found) == bool(rollout)
    for _, one in found:  # only rank 0 has these
        one["routing"], one["text"] = array("B"), ""
    assert others == steps
