"""The `math` reward: is the answer found in the response equal to the reference answer?"""

from __future__ import annotations

from dataclasses import dataclass

from etr_megatron.config import RewardConfig
from etr_megatron.reward.exact import plain_number, same_number, tidy
from etr_megatron.reward.extract import MAX_ANSWER_CHARS, extract_answer, reference_answer


class UnusableReferenceError(ValueError):
    """The data's reference answer cannot be compared with a response."""


@dataclass(frozen=True, slots=True)
class AnswerComparison:
    """correct: whether the answers are equal. detail: what was compared, for people to read."""

    correct: bool
    detail: str


def verify_answer(response: str, answer: str, config: RewardConfig) -> AnswerComparison:
    """Extract the answer and compare it as text, then as rational numbers, and only then symbolically.

    answer: the reference, with or without a worked solution before `####` or `\\boxed{}`.
    Raises UnusableReferenceError for a reference that is empty or too long to be an answer.
    """
    reference = reference_answer(answer, config.extract)
    if not reference:
        raise UnusableReferenceError("the reference answer is empty")
    if len(reference) > MAX_ANSWER_CHARS:
        raise UnusableReferenceError(
            f"the reference answer has {len(reference)} characters; at most {MAX_ANSWER_CHARS} are compared"
        )
    candidate = extract_answer(response, config.extract)
    if candidate is None:
        return AnswerComparison(False, f"no answer found; reference {reference}")
    if len(candidate) > MAX_ANSWER_CHARS:
        return AnswerComparison(False, f"answer of {len(candidate)} characters; at most {MAX_ANSWER_CHARS} are compared")
    return AnswerComparison(answers_equal(reference, candidate), f"answer {candidate}; reference {reference}")


def answers_equal(reference: str, candidate: str) -> bool:
    """Whether two answers are equal. Two plain numbers are compared exactly, everything else by math-verify."""
    reference, candidate = tidy(reference), tidy(candidate)
    if reference == candidate:
        return True
    number, candidate_number = plain_number(reference), plain_number(candidate)
    if number is not None and candidate_number is not None:
        return same_number(number, candidate_number)
    if not candidate:
        return False
    # Imported here because it patches SymPy for the whole process, which is only acceptable in a grader.
    from etr_megatron.reward.symbolic import symbolically_equal

    return symbolically_equal(reference, candidate)
