"""Generated arithmetic: exercises and worked solutions, column by column from the right.

    What is 47+385?            7+5=12
                               4+8+1=13
                               0+3+1=4
                               \\boxed{432}

Invariant: every exercise belongs to exactly one of the splits train, eval and warm_start. The split depends only on the
exercise (not on a seed, count or order), so the splits are disjoint for all seeds and sizes; `a+b` and `b+a` count as the
same exercise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from etr_megatron.config.schema import ArithmeticConfig
from etr_megatron.errors import UserError

ArithmeticSplit = Literal["train", "eval", "warm_start"]

_SPLIT_OF_TENTH: tuple[ArithmeticSplit, ...] = ("eval",) + ("train",) * 6 + ("warm_start",) * 3
_EQUALS = ("=", "=", " is ")  # uneven, so that greedy decoding of a forgotten carry is not split between two wordings
_SEPARATORS = ("\n", ", ", "; ")
_DRAWS_PER_PROBLEM = 60
"""Draws per wanted exercise after which the space counts as exhausted; a tenth of all draws fall into `eval`."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """`a operator b` with non-negative operands; `-` has a >= b, and `*` a one-digit b."""

    a: int
    operator: str
    b: int

    @property
    def result(self) -> int:
        """The right answer."""
        if self.operator == "+":
            return self.a + self.b
        return self.a - self.b if self.operator == "-" else self.a * self.b

    @property
    def expression(self) -> str:
        """`47+385`: also the stable id of the exercise."""
        return f"{self.a}{self.operator}{self.b}"

    @property
    def question(self) -> str:
        """The prompt, before any template."""
        return f"What is {self.expression}?"

    @property
    def split(self) -> ArithmeticSplit:
        """The one split that this exercise belongs to."""
        a, b = (self.a, self.b) if self.operator == "-" else sorted((self.a, self.b))
        return _SPLIT_OF_TENTH[_mix((a << 34) ^ (b << 4) ^ "+-*".index(self.operator)) % 10]


@dataclass(frozen=True, slots=True)
class Slips:
    """Error rates in the demonstrations of the warm start.

    forgotten_carry: probability that a carry (or borrow) is dropped.
    wrong_digit: probability per column that its result is off by one.
    """

    forgotten_carry: float = 0.0
    wrong_digit: float = 0.0


def demonstration(exercise: Exercise, slips: Slips, rng: random.Random) -> str:
    """Columns, then the result that follows from them, including slips; without slips it is `exercise.result`.

    The wording varies at random: order of the operands, `=` or `is`, line break, comma or semicolon. It carries no information
    about the result, but gives the policy the entropy of a pretrained model: without it only the slips are uncertain, one token
    in a dozen, and importance ratios stay at 1 everywhere else.
    """
    width = max(len(str(exercise.a)), len(str(exercise.b)))
    tops = [int(digit) for digit in reversed(str(exercise.a).zfill(width))]
    bottoms = [exercise.b] * width if exercise.operator == "*" else map(int, reversed(str(exercise.b).zfill(width)))
    text, digits, carry = "", "", 0
    for column, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):
        last = column == width - 1
        if carry and rng.random() < slips.forgotten_carry:
            carry = 0
        swapped = exercise.operator != "-" and rng.random() < 0.5
        line, value, carry = _column(exercise.operator, top, bottom, carry, last=last, swapped=swapped)
        if rng.random() < slips.wrong_digit:
            value = max(0, value + rng.choice((-1, 1)))
            carry = carry if exercise.operator == "-" else value // 10
        text += f"{line}{rng.choice(_EQUALS)}{value}{rng.choice(_SEPARATORS)}"
        digits = str(value if last else value % 10) + digits
    return f"{text}\\boxed{{{int(digits)}}}"


def exercises(config: ArithmeticConfig, split: ArithmeticSplit) -> list[Exercise]:
    """The configured number of distinct exercises of `train` or `eval`; deterministic in the settings.

    Raises:
        UserError: `config` allows fewer distinct exercises than it asks for.
    """
    wanted = config.train_problems if split == "train" else config.eval_problems
    found: dict[Exercise, None] = {}
    draws = _draws(config, split)
    for _ in range(_DRAWS_PER_PROBLEM * wanted):
        if len(found) == wanted:
            break
        exercise = next(draws)
        if exercise.split == split:
            found[exercise] = None
    if len(found) < wanted:
        raise UserError(
            f"arithmetic.{split}_problems is {wanted}, but operands of {config.min_digits} to {config.max_digits} digits with "
            f"operators {', '.join(config.operators)} give only about {len(found)}: "
            "raise arithmetic.max_digits or ask for fewer"
        )
    return list(found)


def warm_start_exercises(config: ArithmeticConfig, seed: int) -> Iterator[Exercise]:
    """An endless stream from the `warm_start` split (with repeats); deterministic in digits, operators and seed."""
    draws = _draws(config, f"warm_start:{seed}")
    return (exercise for exercise in draws if exercise.split == "warm_start")


def _column(operator: str, top: int, bottom: int, carry: int, *, last: bool, swapped: bool) -> tuple[str, int, int]:
    """One column: (text left of `=`, its value, the carry or borrow); `swapped` writes the bottom digit first."""
    taken_along = f"{operator if operator == '-' else '+'}{carry}" if carry else ""
    if operator == "-":
        borrow = int(top - carry < bottom and not last)
        top += 10 * borrow
        return f"{top}{taken_along}-{bottom}", max(0, top - carry - bottom), borrow
    value = (top + bottom if operator == "+" else top * bottom) + carry
    first, second = (bottom, top) if swapped else (top, bottom)
    return f"{first}{operator}{second}{taken_along}", value, value // 10


def _draws(config: ArithmeticConfig, purpose: str) -> Iterator[Exercise]:
    """Random exercises of all splits: operator, then the number of digits of each operand, then the operands."""
    rng = random.Random(f"{config.seed if purpose in ('train', 'eval') else ''}:{purpose}")
    while True:
        operator = rng.choice(config.operators)
        a, b = (_operand(rng, rng.randint(config.min_digits, config.max_digits)) for _ in range(2))
        if operator == "*":
            b = rng.randint(2, 9)
        elif operator == "-":
            a, b = max(a, b), min(a, b)
        yield Exercise(a, operator, b)


def _operand(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _mix(value: int) -> int:
    """SplitMix64's finalizer: a fixed 64-bit hash that does not depend on Python's hash seed."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
