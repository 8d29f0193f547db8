"""Groups drawn step by step, in rounds: how they are requested, which of them a step gets, and where a run resumes."""

from __future__ import annotations

import pytest

from etr_megatron.config import Config
from etr_megatron.config.schema import RolloutConfig, RunConfig
from etr_megatron.data import PromptCursor
from etr_megatron.errors import UserError
from etr_megatron.rollout import Sampling
from etr_megatron.rollout.sampler import RoundSampler, chosen
from etr_megatron.types import Sample
from tests.rollout_buffers import grader, names, problems, timer


class Engine:
    """Answers with the problem's number and records the requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], Sampling]] = []

    def generate(self, problems, sampling, must_stop=None):
        self.asked.append(([problem.id for problem in problems], sampling))
        return [[Sample(i, [one.prompt_ids[0]], [-0.5], "stop", 0) for i in range(sampling.samples)] for one in problems]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr("etr_megatron.rollout.collect.on_rank0", lambda body, *, long: body())


def sampler_of(engine, *, flat=(), count=40, shuffle=False, **rollout) -> RoundSampler:
    settings = RolloutConfig(**{"prompts_per_step": 4, "samples_per_prompt": 2, **rollout})
    cursor = PromptCursor(problems(count), seed=1, shuffle=shuffle)
    config = Config(run=RunConfig(seed=5), rollout=settings)
    return RoundSampler(config, engine, cursor, lambda ids: " ".join(map(str, ids)), grader(flat))


def rounds(engine: Engine) -> list[list[str]]:
    return [ids for ids, _ in engine.asked]


def test_responses_are_drawn_with_the_configs_numbers_and_the_steps_seed():
    engine, options = Engine(), dict(temperature=0.7, top_p=0.9, top_k=11, max_response_tokens=13, samples_per_prompt=3)
    taken = sampler_of(engine, **options).take(8, timer)
    assert [sampling for _, sampling in engine.asked] == [Sampling(3, 13, 0.7, seed=5, step=8, top_p=0.9, top_k=11)]
    assert [group.id for group in taken.groups] == ["p0@8", "p1@8", "p2@8", "p3@8"]
    assert [[one.text for one in group.samples] for group in taken.groups] == [[str(n)] * 3 for n in range(4)]


def test_flat_groups_are_trained_on_where_sampling_is_not_dynamic():
    engine = Engine()
    taken = sampler_of(engine, flat=("p0", "p2"), max_oversample=3).take(1, timer)
    assert names(taken) == ["p0", "p1", "p2", "p3"] and taken.counts == {}
    assert rounds(engine) == [["p0", "p1", "p2", "p3"]]


def test_each_round_asks_for_as_many_prompts_as_groups_are_missing():
    engine = Engine()
    taken = sampler_of(engine, flat=("p1", "p2", "p4"), dynamic_sampling=True, max_oversample=2).take(1, timer)
    assert rounds(engine) == [["p0", "p1", "p2", "p3"], ["p4", "p5"], ["p6"]]
    assert names(taken) == ["p0", "p3", "p5", "p6"]
    assert taken.counts == {"groups_asked": 7, "groups_dropped": 3, "groups_filled": 0}


@pytest.mark.parametrize(("count", "last"), [(40, ["p4", "p5"]), (5, ["p4"])], ids=["oversample", "problems"])
def test_a_step_asks_for_no_more_than_it_may_and_there_are_and_is_filled_with_flat_groups(count, last):
    engine = Engine()
    sampler = sampler_of(engine, flat=("p0", "p2", "p3", "p4", "p5"), count=count, dynamic_sampling=True, max_oversample=1.5)
    taken = sampler.take(1, timer)
    assert rounds(engine) == [["p0", "p1", "p2", "p3"], last]
    assert names(taken) == ["p0", "p1", "p2", "p3"]
    assert taken.counts == {"groups_asked": 4 + len(last), "groups_dropped": 3 + len(last), "groups_filled": 3}


def test_no_step_asks_for_a_problem_twice_at_the_end_of_an_epoch():
    engine = Engine()
    options = dict(prompts_per_step=2, dynamic_sampling=True, max_oversample=2)
    sampler = sampler_of(engine, flat=("p0", "p3"), count=5, shuffle=True, **options)
    for step in range(1, 31):
        sampler.take(step, timer)
    for step in range(1, 31):
        asked = [one for ids, sampling in engine.asked if sampling.step == step for one in ids]
        assert len(set(asked)) == len(asked)


def test_of_more_groups_than_a_step_needs_the_first_are_taken():
    asked = sampler_of(Engine(), prompts_per_step=5).take(1, timer).groups
    assert [group.problem.id for group in chosen(asked, 3, dynamic=True).groups] == ["p0", "p1", "p2"]


def test_prompts_of_the_last_step_begun_are_dealt_out_again_and_of_no_other():
    engine = Engine()
    sampler = sampler_of(engine)
    sampler.take(1, timer)
    sampler.take(2, timer)
    sampler.put_back(3)
    sampler.put_back(1)
    assert names(sampler.take(3, timer)) == ["p8", "p9", "p10", "p11"]
    sampler.put_back(3)
    resumed = sampler_of(engine)
    resumed.load_state_dict(sampler.state_dict())
    assert names(resumed.take(3, timer)) == ["p8", "p9", "p10", "p11"]


def test_a_state_with_groups_that_servers_had_begun_is_refused():
    sampler = sampler_of(Engine())
    with pytest.raises(UserError, match=r"holds 2 unfinished groups, .*; set rollout\.backend=sglang to resume it"):
        sampler.load_state_dict({**sampler.state_dict(), "in_hand": [{}, {}]})
