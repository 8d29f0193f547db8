from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest

from etr_megatron.config.schema import ArithmeticConfig
from etr_megatron.data.arithmetic import (
    Exercise,
    Slips,
    demonstration,
    exercises,
    warm_start_exercises,
)
from etr_megatron.errors import UserError

ALL_OPERATORS = ArithmeticConfig(operators=("+", "-", "*"), train_problems=600, eval_problems=90)


class Plainest(random.Random):
    """Always the first wording, and no slips."""

    def random(self) -> float:
        return 1.0

    def choice(self, options):
        return options[0]


def plainest(exercise: Exercise) -> str:
    return demonstration(exercise, Slips(), Plainest())


def boxed(solution: str) -> int:
    return int(re.fullmatch(r".*\\boxed\{(\d+)\}", solution, flags=re.DOTALL).group(1))


def column_terms(solution: str) -> list[tuple[str, int]]:
    """(left side, value) of every column, for any wording."""
    columns = re.split(r"\n|, |; ", solution)[:-1]
    return [(left, int(value)) for left, value in (re.split(r"=| is ", column) for column in columns)]


def test_the_solution_of_an_addition_carries_column_by_column():
    assert plainest(Exercise(47, "+", 385)) == "7+5=12\n4+8+1=13\n0+3+1=4\n\\boxed{432}"


def test_the_solution_of_a_subtraction_borrows_across_a_zero():
    assert plainest(Exercise(305, "-", 78)) == "15-8=7\n10-1-7=2\n3-1-0=2\n\\boxed{227}"


def test_the_solution_of_a_multiplication_adds_the_carry():
    assert plainest(Exercise(47, "*", 8)) == "7*8=56\n4*8+5=37\n\\boxed{376}"


@pytest.mark.parametrize("operator", ["+", "-", "*"])
def test_every_column_and_the_boxed_result_are_right_without_slips(operator):
    config = replace(ALL_OPERATORS, operators=(operator,), min_digits=1, max_digits=4)
    rng = random.Random(0)
    for exercise in exercises(config, "train"):
        expected = {"+": exercise.a + exercise.b, "-": exercise.a - exercise.b, "*": exercise.a * exercise.b}[operator]
        assert exercise.result == expected
        solution = demonstration(exercise, Slips(), rng)
        assert boxed(solution) == expected
        assert all(eval(left) == value for left, value in column_terms(solution))


def test_demonstrations_forget_carries_at_the_given_rate():
    rng = random.Random(3)
    carrying = [Exercise(a, "+", b) for a in range(10, 90) for b in range(10, 100 - a) if a % 10 + b % 10 >= 10]
    forgotten = sum(boxed(demonstration(e, Slips(forgotten_carry=0.3), rng)) == e.result - 10 for e in carrying)
    assert forgotten / len(carrying) == pytest.approx(0.3, abs=0.05)


def test_a_forgotten_carry_changes_nothing_where_there_is_none():
    assert boxed(demonstration(Exercise(123, "+", 456), Slips(forgotten_carry=1.0), random.Random(0))) == 579


def test_wrong_digits_occur_at_the_given_rate_and_are_one_off():
    rng, wrong, columns = random.Random(5), 0, 0
    for exercise in exercises(ALL_OPERATORS, "train"):
        for left, value in column_terms(demonstration(exercise, Slips(wrong_digit=0.2), rng)):
            assert abs(eval(left) - value) <= 1
            wrong += eval(left) != value
            columns += 1
    assert 0.15 < wrong / columns < 0.21  # below 0.2, as a zero cannot be decremented


def test_demonstrations_differ_in_wording():
    wordings = {demonstration(Exercise(12, "+", 34), Slips(), random.Random(seed)) for seed in range(40)}
    assert len(wordings) > 10


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_same_seed_gives_the_same_problems_and_another_seed_others(split):
    first = exercises(ALL_OPERATORS, split)
    assert first == exercises(ALL_OPERATORS, split)
    assert set(first) != set(exercises(replace(ALL_OPERATORS, seed=1), split))
    assert len(first) == len(set(first)) == {"train": 600, "eval": 90}[split]


def test_splits_are_disjoint_for_any_seeds_also_with_operands_exchanged():
    config = replace(ALL_OPERATORS, min_digits=1, max_digits=2)
    groups = {
        "train": exercises(config, "train") + exercises(replace(config, seed=7), "train"),
        "eval": exercises(config, "eval") + exercises(replace(config, seed=8), "eval"),
        "warm_start": list(itertools.islice(warm_start_exercises(config, seed=9), 3000)),
    }
    keys = {
        split: {(e.operator, e.a, e.b) if e.operator == "-" else (e.operator, *sorted((e.a, e.b))) for e in members}
        for split, members in groups.items()
    }
    for one, other in itertools.combinations(keys, 2):
        assert not keys[one] & keys[other]


def test_operands_keep_to_the_configured_digits_and_subtraction_stays_non_negative():
    for exercise in exercises(replace(ALL_OPERATORS, min_digits=2, max_digits=3), "train"):
        assert 10 <= exercise.a <= 999
        assert (2 <= exercise.b <= 9) if exercise.operator == "*" else (10 <= exercise.b <= 999)
        assert exercise.operator != "-" or exercise.a >= exercise.b


def test_asking_for_more_problems_than_exist_is_refused_by_name():
    config = ArithmeticConfig(min_digits=1, max_digits=1, operators=("+",), train_problems=4096)
    with pytest.raises(UserError, match=r"arithmetic\.train_problems is 4096.*arithmetic\.max_digits"):
        exercises(config, "train")


def test_one_digit_problems_leave_some_for_the_warm_start():
    for operator in "+-*":
        config = ArithmeticConfig(min_digits=1, max_digits=1, operators=(operator,))
        assert next(warm_start_exercises(config, seed=0)).split == "warm_start"
