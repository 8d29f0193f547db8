"""Finding the answer in a response, and comparing plain answers exactly."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from etr_megatron.config import RewardConfig
from etr_megatron.reward import GradeRequest, load_grader
from etr_megatron.reward.exact import plain_number, tidy
from etr_megatron.reward.extract import MAX_ANSWER_CHARS, extract_answer, reference_answer
from etr_megatron.reward.math_reward import UnusableReferenceError, answers_equal, verify_answer

ALL = ("boxed", "hash", "last_number")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7, done", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{3}, then \boxed .", "3"),
        (r"\boxed{\boxed 5} apples", "5"),
        (r"} \boxed{4}", "4"),
        (r"\boxedly 5", None),
        (r"\boxed{} 9", None),
        (r"\boxed{4", None),
        ("42", None),
    ],
)
def test_boxed(text, answer):
    assert extract_answer(text, ("boxed",)) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("work\n#### 72", "72"),
        ("#### 1\nthen\n#### 1,000.\nrest", "1,000"),
        ("#### $18", "$18"),
        ("#### 72 dollars", "72"),
        ("#### 3 x", "3 x"),
        ("**#### 5**", "5"),
        ("####\n5", None),
        ("### 5", None),
    ],
)
def test_after_hash(text, answer):
    assert extract_answer(text, ("hash",)) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("first 3 then 4.", "4"),
        ("costs $1,234.50.", "1,234.50"),
        ("it is -7", "-7"),
        ("x=-7", "-7"),
        ("10-5", "5"),
        ("between 5 and 10−3", "3"),
        ("a half, .5", ".5"),
        ("3/4 of it", "3/4"),
        ("that is 3/45.", "3/45"),
        (r"is \frac{3}{4}", r"\frac{3}{4}"),
        (r"is -\frac{3}{4}.", r"-\frac{3}{4}"),
        ("raised by 50%", "50%"),
        (r"raised by 50\%.", r"50\%"),
        ("about 6.02e23", "6.02e23"),
        ("pages 1, 2, 3", "3"),
        ("1{,}000 apples", "1{,}000"),
        ("12,34", "34"),
        ("none", None),
        ("٣", None),
    ],
)
def test_last_number(text, answer):
    assert extract_answer(text, ("last_number",)) == answer


def test_the_order_of_the_config_decides():
    text = "#### 1\n\\boxed{2} 3"
    assert [extract_answer(text, (first, *ALL)) for first in ALL] == ["2", "1", "3"]
    assert extract_answer("just 3", ALL) == "3"


@pytest.mark.parametrize("order", [ALL, ("last_number",)])
def test_reference_answer_is_taken_from_behind_its_marker(order):
    assert reference_answer("48/2 = <<48/2=24>>24\n#### 72", order) == "72"
    assert reference_answer(r"Thus 5, that is \boxed{x+1}.", order) == "x+1"
    assert reference_answer(" x + 1 ", order) == "x + 1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", Fraction(1000)),
        ("-1,234,567.50", Fraction(-2469135, 2)),
        ("72.", Fraction(72)),
        ("+.5", Fraction(1, 2)),
        ("- 3", Fraction(-3)),
        ("1/3", Fraction(1, 3)),
        ("-1/-3", Fraction(1, 3)),
        (r"\frac{1}{3}", Fraction(1, 3)),
        (r"-\dfrac{-1}{3}", Fraction(1, 3)),
        (r"\frac12", Fraction(1, 2)),
        (r"\tfrac{1,000}{2.5}", Fraction(400)),
        ("1e-3", Fraction(1, 1000)),
        ("007", Fraction(7)),
    ],
)
def test_plain_number(text, value):
    number = plain_number(text)
    assert number is not None
    assert (number.value, number.percent) == (value, False)


@pytest.mark.parametrize(
    ("text", "value"),
    [("50%", 50), (r"50\%", 50), ("-.5 %", Fraction(-1, 2)), ("1/3%", Fraction(1, 3)), (r"\frac12\%", Fraction(1, 2))],
)
def test_a_plain_percentage(text, value):
    number = plain_number(text)
    assert number is not None
    assert (number.value, number.percent) == (value, True)


@pytest.mark.parametrize("text", ["", "x", "1,2", "1/0", "1 2", "1e9999", "9^9", "--1", "1_000", "٣", "inf", "nan", "%"])
def test_not_a_plain_number(text):
    assert plain_number(text) is None


@pytest.mark.parametrize(
    ("reference", "candidate", "same"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.50", True),
        ("1,000", "1000", True),
        ("1000", "1{,}000", True),
        ("72", "72.0", True),
        ("72", "$72", True),
        ("72", r"\$72.00", True),
        ("72", r"\text{72}", True),
        ("-3", "−3", True),
        ("50%", "50", True),
        ("50", r"50\%", True),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("50%", "0.5%", False),
        ("0.5%", "50%", False),
        ("50", "0.5", False),
        ("0.5", "50", False),
        ("1/3", "0.333333", True),
        ("0.666667", "2/3", True),
        ("1/3", "0.33", False),
        ("1/3", "0.33333", False),
        ("1/3", "3.33333e-1", True),
        ("1/3", "0.333334", False),
        ("0.333333", "0.3333333", False),
        ("0.0000001", "0.0000002", False),
        ("0.1234567", "0.123457", False),
        ("0.00000025", "0.000000", False),
        ("72", "73", False),
        ("-3", "3", False),
        ("1.000", "1000", False),
        ("Friday", r"\text{Friday}", True),
        ("Friday", "Friday.", True),
        ("Friday.", "Friday", True),
    ],
)
def test_plain_answers_are_compared_exactly(reference, candidate, same):
    assert answers_equal(reference, candidate) is same


@pytest.mark.parametrize(("text", "tidied"), [("**72**", "72"), ("−3", "-3"), (r"\left( 1,\, 2 \right).", "( 1, 2 )")])
def test_tidying_leaves_what_carries_meaning(text, tidied):
    assert tidy(text) == tidied


def test_tidying_keeps_the_row_break_of_a_matrix():
    assert tidy(r"\begin{pmatrix} 1 \\ 2\, \end{pmatrix}") == r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"


def test_a_response_without_an_answer_is_wrong_and_says_so():
    comparison = verify_answer("I do not know", "5", RewardConfig())
    assert not comparison.correct
    assert "no answer found" in comparison.detail


def test_the_first_hit_of_the_configs_order_is_compared_with_the_references_own():
    response, reference = "#### 5\n\\boxed{6}", "3 + 3 = 6, not 5\n#### 6"
    for order, correct in ((("boxed", "hash"), True), (("hash", "boxed"), False), (("last_number",), True)):
        assert verify_answer(response, reference, RewardConfig(extract=order)).correct is correct


def test_an_answer_may_be_as_long_as_is_compared():
    longest = "a" * MAX_ANSWER_CHARS
    assert MAX_ANSWER_CHARS == 500
    assert verify_answer(rf"\boxed{{{longest}}}", longest, RewardConfig()).correct
    assert "at most 500" in verify_answer(rf"\boxed{{{longest}a}}", "5", RewardConfig()).detail
    with pytest.raises(UnusableReferenceError, match="has 501 characters; at most 500"):
        verify_answer("5", longest + "a", RewardConfig())


def test_an_endless_answer_is_wrong_without_being_parsed():
    comparison = verify_answer(r"\boxed{" + "(1+" * MAX_ANSWER_CHARS + "}", "5", RewardConfig(extract=("boxed",)))
    assert not comparison.correct
    assert "at most" in comparison.detail


def test_right_and_wrong_are_the_ends_of_the_declared_range_and_no_reference_is_the_lowest():
    grade = load_grader(RewardConfig(range_min=-1.0, range_max=3.0))
    found = [grade(GradeRequest("", response, answer)) for response, answer in (("5", "5"), ("6", "5"), ("6", " "))]
    assert [(one.reward, one.status) for one in found] == [(3.0, "ok"), (-1.0, "ok"), (-1.0, "error")]


@pytest.mark.parametrize("answer", ["", "  ", "word " * MAX_ANSWER_CHARS])
def test_a_reference_that_is_no_answer_is_refused(answer):
    with pytest.raises(UnusableReferenceError, match="reference answer"):
        verify_answer("5", answer, RewardConfig())


@pytest.mark.parametrize("text", [r"\boxed{" * 20_000, "1" * 200_000, "1," * 100_000, "####" * 50_000, "-" * 200_000])
def test_extraction_takes_no_quadratic_time(text):
    start = time.process_time()
    extract_answer(text, ALL)
    assert time.process_time() - start < 20  # linear: under 0.2 s; a scan from every mark: minutes
