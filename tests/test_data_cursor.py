from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etr_megatron.data import ProblemSet, PromptCursor
from etr_megatron.data.problems import refuse_unknown_tokens
from etr_megatron.errors import UserError
from etr_megatron.types import Problem


def problem_set(count: int, answer: str = "1") -> ProblemSet:
    return ProblemSet([Problem(id=f"p{i}", prompt=f"q{i}", answer=answer, prompt_ids=[i]) for i in range(count)])


def ids(problems: list[Problem]) -> list[str]:
    return [problem.id for problem in problems]


def test_every_epoch_holds_every_problem_once_in_another_order():
    cursor = PromptCursor(problem_set(12), seed=3, shuffle=True)
    epochs = [ids(cursor.next(12)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(ids(list(problem_set(12)))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert cursor.epoch == 3.0


def test_the_order_is_that_of_the_seed():
    orders = [ids(PromptCursor(problem_set(12), seed=seed, shuffle=True).next(12)) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffling_the_order_is_that_of_the_source():
    cursor = PromptCursor(problem_set(4), seed=3, shuffle=False)
    assert [ids(cursor.next(2)) for _ in range(3)] == [["p0", "p1"], ["p2", "p3"], ["p0", "p1"]]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
)
def test_steps_of_any_size_drop_nothing_and_never_hold_a_problem_twice(count, sizes, shuffle, seed):
    cursor = PromptCursor(problem_set(count), seed=seed, shuffle=shuffle)
    seen: list[str] = []
    for size in sizes:
        step = ids(cursor.next(min(size, count)))
        assert len(set(step)) == len(step) == min(size, count)
        seen += step
    for start in range(0, len(seen), count):
        assert max(Counter(seen[start : start + count]).values()) == 1


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 9), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20), cut=st.integers(0, 20))
def test_a_resumed_cursor_goes_on_as_if_it_had_not_stopped(count, sizes, cut):
    whole, first, resumed = (PromptCursor(problem_set(count), seed=1, shuffle=True) for _ in range(3))
    sizes = [min(size, count) for size in sizes]
    expected = [ids(whole.next(size)) for size in sizes]
    before = [ids(first.next(size)) for size in sizes[:cut]]
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [ids(resumed.next(size)) for size in sizes[cut:]] == expected


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (PromptCursor(problem_set(6), seed=1, shuffle=True), "number of problems was 5 and is 6"),
        (PromptCursor(problem_set(5, answer="2"), seed=1, shuffle=True), "fingerprint"),
        (PromptCursor(problem_set(5), seed=2, shuffle=True), "run.seed was 1 and is 2"),
        (PromptCursor(problem_set(5), seed=1, shuffle=False), "data.shuffle was True and is False"),
    ],
)
def test_a_state_of_other_data_or_order_is_refused_and_changes_nothing(other, named):
    saved = PromptCursor(problem_set(5), seed=1, shuffle=True)
    saved.next(3)
    before = other.state_dict()
    with pytest.raises(UserError, match=named):
        other.load_state_dict(saved.state_dict())
    assert other.state_dict() == before


def test_a_step_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"asks for 6 prompts, but there are only 5 .*rollout\.prompts_per_step"):
        PromptCursor(problem_set(5), seed=1, shuffle=True).next(6)


def test_the_fingerprint_follows_everything_of_a_problem_and_their_order():
    problems = list(problem_set(3))
    others = [{"id": "p9"}, {"prompt": "q9"}, {"answer": "2"}, {"prompt_ids": [9]}]
    changed = [[*problems[:2], replace(problems[2], **other)] for other in others]
    prints = {ProblemSet(rows).fingerprint for rows in (problems, problems[::-1], *changed)}
    assert len(prints) == 6
    assert ProblemSet(list(problems)).fingerprint in prints


def test_a_prompt_with_a_token_that_the_model_has_not_is_refused_wherever_it_is():
    problems = [Problem("a", "", "", [3, 9, 1]), Problem("b", "", "", [2, 8, 10, 4])]
    refuse_unknown_tokens(problems, 11, "model")
    refuse_unknown_tokens([], 11, "model")
    with pytest.raises(UserError, match=r"^model: the tokenizer produces token id 10 for a prompt, but the model has only 10 "):
        refuse_unknown_tokens(problems, 10, "model")
