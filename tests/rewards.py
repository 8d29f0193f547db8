"""A reward of a user's own, for runs whose policy is too small to get arithmetic right."""

from __future__ import annotations


def digit_sum_is_even(prompt: str, response: str, answer: str) -> float:
    return float(sum(int(c) for c in response if c.isdigit()) % 2 == 0)


def always_fails(prompt: str, response: str, answer: str) -> float:
    raise KeyError("gold")
