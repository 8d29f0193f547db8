"""Shares of several training sets: exact in every step, resumable, and without an end."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etr_megatron.data import BlendedCursor, ProblemSet, PromptCursor, set_of
from etr_megatron.errors import UserError
from etr_megatron.types import Problem


def problem_set(sizes: dict[str, int], answer: str = "1") -> ProblemSet:
    """Problems of several sets under the ids that `named` gives."""
    names = [f"{name}/a/{number}" for name, size in sizes.items() for number in range(size)]
    return ProblemSet([Problem(name, f"q {name}", answer, [number]) for number, name in enumerate(names)])


def cursor(sizes: dict[str, int], weights: dict[str, float], **options) -> BlendedCursor:
    return BlendedCursor(problem_set(sizes), weights, **{"seed": 3, "shuffle": True} | options)


def ids(problems: list[Problem]) -> list[str]:
    return [problem.id for problem in problems]


def test_every_part_of_a_step_has_the_shares_and_each_set_its_own_epochs():
    one = cursor({"large": 90, "small": 5}, {"large": 3, "small": 1})
    steps = [ids(one.next(16)) for _ in range(20)]
    for step in steps:
        assert [Counter(map(set_of, step[i : i + 4])) for i in range(0, 16, 4)] == [{"large": 3, "small": 1}] * 4
        assert len(set(step)) == 16
    dealt = Counter(problem for step in steps for problem in step)
    assert {dealt[f"small/a/{i}"] for i in range(5)} == {16}  # 80 of 5
    assert Counter(dealt[f"large/a/{i}"] for i in range(90)) == {2: 30, 3: 60}  # 240 of 90
    by_set = [[one for step in steps for one in step if set_of(one) == "small"][i : i + 5] for i in range(0, 80, 5)]
    assert all(len(set(epoch)) == 5 for epoch in by_set) and len(set(map(tuple, by_set))) > 1  # in another order


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=4),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=20),
)
def test_no_set_is_ever_further_from_its_share_than_the_number_of_sets(weights, counts):
    shares = {f"s{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    one, dealt = cursor(dict.fromkeys(shares, 9), dict(zip(shares, weights, strict=True))), Counter()
    for count in counts:
        dealt += Counter(map(set_of, ids(one.next(count))))
        assert all(abs(dealt[name] - share * dealt.total()) < len(shares) for name, share in shares.items())


def test_a_step_that_has_all_problems_of_a_set_takes_more_of_the_others():
    one = cursor({"large": 9, "small": 2}, {"large": 1, "small": 1})
    first = one.next(8)
    assert Counter(map(set_of, ids(first))) == {"large": 6, "small": 2}
    rest = one.next(3, after=ids(first))  # the same step, as in dynamic sampling
    assert sorted(ids(first) + ids(rest)) == sorted(ids(list(problem_set({"large": 9, "small": 2}))))
    with pytest.raises(UserError, match=r"asks for 12 prompts, but there are only 11 problems in all sets of data\.train"):
        one.next(1, after=ids(first) + ids(rest))


def test_a_set_that_is_too_small_for_its_share_gives_what_it_has_in_every_step_and_claims_nothing_later():
    one = cursor({"large": 100, "small": 3}, {"large": 1, "small": 1})
    for _ in range(50):
        assert [set_of(problem.id) for problem in one.next(10)] == ["large", "small"] * 3 + ["large"] * 4
    assert Counter(map(set_of, ids(one.next(4)))) == {"large": 2, "small": 2}


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=15), cut=st.integers(0, 15))
def test_a_resumed_cursor_goes_on_as_if_it_had_not_stopped(counts, cut):
    whole, first, resumed = (cursor({"a": 4, "b": 7}, {"a": 2, "b": 1}) for _ in range(3))
    expected = [ids(whole.next(count)) for count in counts]
    before = [ids(first.next(count)) for count in counts[:cut]]
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [ids(resumed.next(count)) for count in counts[cut:]] == expected


def test_other_weights_count_from_where_a_run_is_resumed():
    before, after = cursor({"a": 40, "b": 40}, {"a": 3, "b": 1}), cursor({"a": 40, "b": 40}, {"a": 1, "b": 3})
    had = ids(before.next(16))
    after.load_state_dict(before.state_dict())
    step = ids(after.next(16))
    assert Counter(map(set_of, had)) == {"a": 12, "b": 4} and Counter(map(set_of, step)) == {"a": 4, "b": 12}
    assert not {*had} & {*step}  # each set goes on in its epoch


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (cursor({"a": 4, "c": 4}, {"a": 1, "c": 1}), r"data\.train_weights was for a and b; restore it"),
        (BlendedCursor(problem_set({"a": 4, "b": 4}, "2"), {"a": 1, "b": 1}, seed=3, shuffle=True), "fingerprint"),
        (cursor({"a": 4, "b": 5}, {"a": 1, "b": 1}), "number of problems was 4 and is 5"),
        (PromptCursor(problem_set({"a": 4, "b": 4}), seed=3, shuffle=True), r"data\.train_weights was given; restore it"),
    ],
)
def test_a_state_of_other_sets_is_refused_and_changes_nothing(other, named):
    saved = cursor({"a": 4, "b": 4}, {"a": 1, "b": 1})
    saved.next(3)
    before = other.state_dict()
    with pytest.raises(UserError, match=named):
        other.load_state_dict(saved.state_dict())
    assert other.state_dict() == before


def test_a_state_without_weights_is_refused():
    together = PromptCursor(problem_set({"a": 4, "b": 4}), seed=3, shuffle=True)
    with pytest.raises(UserError, match=r"data\.train_weights was for all sets together; restore it"):
        cursor({"a": 4, "b": 4}, {"a": 1, "b": 1}).load_state_dict(together.state_dict())
