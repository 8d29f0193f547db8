"""A user's own reward functions, for runs whose policy is too small to get arithmetic right."""

from __future__ import annotations

import itertools

_answers = itertools.count()


def digit_sum_is_even(prompt: str, response: str, answer: str) -> float:
    return float(sum(int(c) for c in response if c.isdigit()) % 2 == 0)


def in_parts(prompt: str, response: str, answer: str) -> dict[str, object]:
    return {"score": digit_sum_is_even(prompt, response, answer), "digits": sum(map(str.isdigit, response)), "text": response}


def always_fails(prompt: str, response: str, answer: str) -> float:
    raise KeyError("gold")


def doubled_after_30_answers(prompt: str, response: str, answer: str) -> float:
    """0 or 1 for a grader's first answers, then 0 or 2."""
    return digit_sum_is_even(prompt, response, answer) * (1 if next(_answers) < 30 else 2)


def level(prompt: str, response: str, answer: str, columns: dict[str, float]) -> float:
    return columns["level"]
