"""Dialogues with the embedded engine, in which every rank takes part."""

from __future__ import annotations

import pytest
import torch

from etr_megatron.config import Config
from etr_megatron.config.schema import EnvironmentConfig, RolloutConfig, RunConfig
from etr_megatron.data import PromptCursor
from etr_megatron.environment import EnvironmentReply
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.reward import Grade
from etr_megatron.rollout import Sampling, UngradedError, sample_seed
from etr_megatron.rollout.collect import grade_samples
from etr_megatron.rollout.rounds import draw_further_turns
from etr_megatron.rollout.sampler import RoundSampler
from etr_megatron.types import Group, Problem, Sample
from tests.dialogue_jobs import ENDS, Environment, counting, dialogues_of, ids_of, says, text_of
from tests.rollout_buffers import problems, timer
from tests.test_policy_logprobs import reference

PROMPTS = [[5, 6, 7], [9], [100, 3, 250, 17, 60, 2], [44, 44], [8, 1, 300]]
STOPS = [*range(0, 320, 5)]  # every fifth token ends a turn
OPTIONS = dict(temperature=0.9, samples=3, max_tokens=40, stop_ids=STOPS, turns=4)


def drawn(gangs, model, world, **options):
    return gangs(world).run("tests.dialogue_jobs:dialogues", model=model, prompts=PROMPTS, **{**OPTIONS, **options})


def test_dialogues_do_not_depend_on_the_number_of_ranks_and_all_ranks_hold_the_same(gangs, hf_models):
    alone = drawn(gangs, hf_models["qwen3"], 1)[0]
    assert {sum(message["role"] == "assistant" for message in one["messages"]) for group in alone for one in group} >= {1, 2, 3}
    for replies in (drawn(gangs, hf_models["qwen3"], world) for world in (2, 4)):
        assert replies[0] == alone
        for reply in replies[1:]:  # messages are rank 0's
            assert [[one | {"messages": []} for one in group] for group in alone] == reply


def test_logprobs_of_every_turn_equal_transformers_after_all_tokens_before_it_replies_included(gangs, hf_models):
    groups = drawn(gangs, hf_models["llama"], 1)[0]
    samples = [(PROMPTS[n], sample) for n, group in enumerate(groups) for sample in group]
    wanted, _ = reference(hf_models["llama"], [(p, list(s["response_ids"])) for p, s in samples], temperature=0.9)
    compared = 0
    for (_, sample), logp in zip(samples, wanted, strict=True):
        is_drawn = torch.tensor(list(sample["loss_mask"]) or [1] * len(logp)).bool()
        found = torch.tensor(list(sample["rollout_logprobs"])).double()
        torch.testing.assert_close(found[is_drawn], logp[is_drawn], atol=1e-5, rtol=1e-5)
        assert not found[~is_drawn].any()
        compared += int(is_drawn.sum()) if sample["loss_mask"] else 0
    assert compared > 50


def test_tokens_masks_and_messages_of_a_dialogue_belong_together(gangs, hf_models):
    groups = drawn(gangs, hf_models["qwen2"], 1)[0]
    ends = set()
    for one in (one for group in groups for one in group):
        ids, mask, turns, replied = [], [], [], []
        for message in one["messages"]:
            if message["role"] == "assistant":
                turns.append([int(word) for word in message["content"].split()])
                ids += turns[-1]
                mask += [1] * len(turns[-1])
            else:
                replied.append(message["content"])
                reply = ids_of([message], ids[-1])
                ids += reply
                mask += [0] * len(reply)
        assert list(one["response_ids"]) == ids and (list(one["loss_mask"]) or [1] * len(ids)) == mask
        assert replied == [f"{sum(map(len, turns[: n + 1]))} 11" for n in range(len(turns) - 1)]
        assert all(turn[-1] in STOPS and not set(turn[:-1]) & set(STOPS) for turn in turns[:-1])
        ends.add((one["finish_reason"], len(turns)))
        assert len(ids) <= 40 and (one["finish_reason"] == "length" or turns[-1][-1] in STOPS)
    assert {("stop", 1), ("stop", 4)} <= ends


def test_the_experts_of_a_dialogue_cover_its_prompt_turns_and_replies(gangs, hf_models):
    groups = drawn(gangs, hf_models["qwen3_moe"], 1, routing=True)[0]
    sizes = {
        len(one["routing"]) / (len(PROMPTS[n]) + len(one["response_ids"]) - 1)
        for n, group in enumerate(groups)
        for one in group
    }
    assert len(sizes) == 1 and max(len(one["messages"]) for group in groups for one in group) > 2


class Engine:
    """Draws turns of two tokens, of which the second ends it; the first is the turn's number. asked: all requests."""

    def __init__(self, finish=lambda problem, turn: "stop") -> None:
        self.asked: list[tuple[Problem, Sampling, int]] = []
        self._finish = finish

    def generate(self, problems, sampling, must_stop=None):
        found = []
        for problem, count, limit in zip(
            problems, sampling.samples_of(problems), sampling.max_tokens_of(problems), strict=True
        ):
            self.asked.append((problem, sampling, limit))
            turn = int(problem.id.partition("/")[2].partition("/")[2] or 1)
            finish = self._finish(problem, turn)
            ids = [] if finish == "abort" else [turn, 90][:limit]
            finish = "length" if limit == 1 else finish
            found.append([Sample(index, ids, [-0.5] * len(ids), finish, 7) for index in range(count)])
        return found


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr("etr_megatron.rollout.rounds.on_rank0", lambda body: body())
    monkeypatch.setattr("etr_megatron.rollout.collect.on_rank0", lambda body, *, long: body())
    monkeypatch.setattr("etr_megatron.rollout.rounds.on_rank0_until_stopped", lambda body, must_stop: body(must_stop))


def groups_of(engine: Engine, sampling: Sampling, count: int = 2) -> list[Group]:
    some = problems(count)
    return [
        Group(f"{problem.id}@1", problem, samples)
        for problem, samples in zip(some, engine.generate(some, sampling), strict=True)
    ]


SAMPLING = Sampling(2, 20, 1.0, seed=3, step=1)


def test_every_turn_of_every_sample_has_a_seed_of_its_own_and_the_room_that_is_left(one_rank):
    engine = Engine()
    groups = groups_of(engine, SAMPLING)
    draw_further_turns(engine, groups, SAMPLING, dialogues_of(Environment(lambda request: says("4 4")), max_turns=3))
    later = engine.asked[2:]
    samples = ["p0/0", "p0/1", "p1/0", "p1/1"]
    assert SAMPLING.names_of(problems(2)) == samples
    assert all(list(sampling.continued) == sampling.names_of([]) == samples for _, sampling, _ in later)
    assert [problem.id for problem, _, _ in later] == [
        *("p0/0/2", "p0/1/2", "p1/0/2", "p1/1/2"),
        *("p0/0/3", "p0/1/3", "p1/0/3", "p1/1/3"),
    ]
    seeds = {sample_seed(sampling, problem, 0) for problem, sampling, _ in later}
    assert len(seeds) == 8 and all((sampling.samples, sampling.step) == (1, 1) for _, sampling, _ in later)
    assert [limit for _, _, limit in later] == [15] * 4 + [10] * 4
    assert later[4][0].prompt_ids.tolist() == [0, 7, 1, 90, 90, 4, 4, 2, 90, 90, 4, 4]
    sample = groups[1].samples[1]
    assert sample.response_ids.tolist() == [1, 90, 90, 4, 4, 2, 90, 90, 4, 4, 3, 90]
    assert sample.num_generated == 6 and sample.turns == 3
    assert sample.loss_mask.tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1] and sample.finish_reason == "length"


@pytest.mark.parametrize(("room", "ids"), [(5, [1, 90]), (6, [1, 90, 90, 4, 4, 2])])
def test_a_reply_that_leaves_no_room_for_another_token_is_left_out_and_the_response_too_long(one_rank, room, ids):
    engine, sampling = Engine(), Sampling(1, room, 1.0, seed=3, step=1)
    groups = groups_of(engine, sampling, 1)
    draw_further_turns(engine, groups, sampling, dialogues_of(Environment(lambda request: says("4 4"))))
    (sample,) = groups[0].samples
    assert (sample.response_ids.tolist(), sample.finish_reason) == (ids, "length")
    assert [message["content"] for message in sample.messages] == (["1 90"] if room == 5 else ["1 90", "4 4", "2"])


def test_a_response_that_was_cut_off_or_given_up_is_not_replied_to(one_rank):
    engine = Engine(lambda problem, turn: {"p0": "length", "p1": "abort"}.get(problem.id, "stop"))
    groups, environment = groups_of(engine, SAMPLING, 3), Environment(lambda request: ENDS)
    draw_further_turns(engine, groups, SAMPLING, dialogues_of(environment))
    assert [request.answer for request in environment.asked] == ["2", "2"]
    assert [group.samples[0].finish_reason for group in groups] == ["length", "abort", "stop"]
    assert groups[0].samples[0].messages == [{"role": "assistant", "content": "1 90"}]
    assert [group.samples[1].environment_status for group in groups] == [None, None, "ok"]


def test_a_later_turn_that_the_engine_gives_up_ends_the_dialogue(one_rank):
    engine = Engine(lambda problem, turn: "abort" if problem.id == "p0/1/2" else "stop")
    groups = groups_of(engine, SAMPLING)
    draw_further_turns(engine, groups, SAMPLING, dialogues_of(Environment(counting(2))))
    assert [[sample.finish_reason for sample in group.samples] for group in groups] == [["stop", "abort"], ["stop", "stop"]]


def test_told_to_stop_while_replies_are_awaited_nothing_is_left_behind(one_rank):
    """The forgotten calls' replies, which come during the second round, change nothing."""
    engine, dialogues = Engine(), dialogues_of(Environment(lambda request: says("4")))
    groups = groups_of(engine, SAMPLING)
    before = [sample.response_ids.tolist() for group in groups for sample in group.samples]
    with pytest.raises(StopAskedError, match="while the environment was asked"):
        draw_further_turns(engine, groups, SAMPLING, dialogues, lambda: True)
    again, alone = groups_of(engine, SAMPLING), groups_of(engine, SAMPLING)
    draw_further_turns(engine, again, SAMPLING, dialogues)
    draw_further_turns(engine, alone, SAMPLING, dialogues_of(Environment(lambda request: says("4"))))
    assert again == alone and again[0].samples[0].turns > 1
    assert [sample.response_ids.tolist() for group in groups for sample in group.samples] == before


def sampler_of(engine: Engine, environment: Environment, grade, **rollout) -> RoundSampler:
    config = Config(
        run=RunConfig(seed=5),
        rollout=RolloutConfig(prompts_per_step=2, samples_per_prompt=2, max_response_tokens=20, **rollout),
        environment=EnvironmentConfig(function="some:reply"),
    )
    cursor = PromptCursor(problems(4), seed=1, shuffle=False)
    return RoundSampler(config, engine, cursor, text_of, grade, dialogues_of(environment))


def test_the_reward_is_that_of_the_models_last_turn_and_sees_all_messages(one_rank):
    seen = []

    def grade(requests):
        seen.extend(requests)
        return [Grade(1.0, "ok", "") for _ in requests]

    taken = sampler_of(Engine(), Environment(counting(2)), grade).take(1, timer)
    assert [request.response for request in seen] == ["2 90"] * 4
    assert seen[2].messages == [
        {"role": "assistant", "content": "1 90"},
        {"role": "user", "content": "2 11"},
        {"role": "assistant", "content": "2 90"},
    ]
    assert taken.groups[0].samples[1].text == "1 90 90 2 11 2 90"


def test_a_dialogue_that_the_engine_has_given_up_has_no_answer():
    turns = [{"role": "assistant", "content": "it is 4"}, {"role": "user", "content": "sure?"}]
    sample, seen = Sample(0, [5, 6, 90], [-1.0, -1.0, 0.0], "abort", 1, loss_mask=[1, 1, 0], messages=turns), []
    grade_samples([(problems(1)[0], sample)], lambda requests: seen.extend(requests) or [Grade(0.0, "ok", "")])
    assert [(request.response, request.messages) for request in seen] == [("", turns)]


def test_an_environment_that_always_fails_ends_the_run_and_one_that_fails_at_times_is_told(one_rank, caplog):
    broken = EnvironmentReply(None, "error", "it raised KeyError: 'x'")
    sampler = sampler_of(Engine(), Environment(lambda request: broken), None)
    with pytest.raises(UngradedError, match=r"^4 of 4 calls of .*: it raised KeyError: 'x' \(problem p[01]\); fix environment"):
        sampler.take(1, timer)
    sampler = sampler_of(
        Engine(),
        Environment(lambda request: broken if request.answer == "0" else ENDS),
        lambda requests: [Grade(1.0, "ok", "") for _ in requests],
    )
    taken = sampler.take(1, timer)
    assert "2 of 4 calls of environment.function failed, which ended their responses" in caplog.text
    assert [group.samples[0].environment_status for group in taken.groups] == ["error", "ok"]


@pytest.mark.parametrize("section", ["environment", "reward"])
def test_calls_that_all_time_out_end_the_run_in_the_third_step_of_these(one_rank, section):
    environment = Environment(lambda _: EnvironmentReply(None, "timeout", "none") if section == "environment" else ENDS)
    grade = Grade(0.0, "timeout", "none") if section == "reward" else Grade(1.0, "ok", "")
    sampler = sampler_of(Engine(), environment, lambda requests: [grade] * len(requests), dynamic_sampling=True)
    for step in (4, 5):
        sampler.take(step, timer)  # several rounds, as flat groups are replaced
    with pytest.raises(UngradedError, match=rf"^{section}\.function timed out for all responses of 3 steps in a row"):
        sampler.take(6, timer)


def fails_second(request) -> EnvironmentReply:
    turns = sum(message["role"] == "assistant" for message in request.messages)
    return says("4 4") if turns == 1 else EnvironmentReply(None, "error", "it raised KeyError: 'x'")


def test_failed_calls_that_end_all_responses_of_a_step_end_the_run_though_calls_before_them_succeeded(one_rank):
    sampler = sampler_of(engine := Engine(), Environment(fails_second), None, dynamic_sampling=True)
    with pytest.raises(UngradedError, match=r"ended all 4 responses; the last: it raised KeyError: 'x' \(problem p[01]\); fix"):
        sampler.take(1, timer)
    assert {problem.id.partition("/")[0] for problem, _, _ in engine.asked} == {"p0", "p1"}  # no further prompts


def test_failed_calls_that_end_all_responses_of_a_later_round_do_not_end_the_run(one_rank):
    """p1 is flat, so p2 replaces it."""

    def grade(requests):
        return [Grade(float(place % 2 and one.answer == "0"), "ok", "") for place, one in enumerate(requests)]

    environment = Environment(lambda request: fails_second(request) if request.answer == "2" else ENDS)
    taken = sampler_of(Engine(), environment, grade, dynamic_sampling=True).take(1, timer)
    assert [group.problem.id for group in taken.groups] == ["p0", "p1"] and taken.counts["groups_asked"] == 3
