"""Compare plain answers exactly, as text or as rational numbers: handles most answers in microseconds, without a parser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.(?P<decimals>[0-9]*))?|\.(?P<only_decimals>[0-9]+)"
_DECIMAL = re.compile(rf"(?P<mantissa>{_NUMBER})(?:[eE](?P<exponent>[+-]?[0-9]{{1,3}}))?")
_SLASHED = re.compile(r"(?P<top>[0-9,.]+)\s*/\s*(?P<sign>-?)(?P<bottom>[0-9,.]+)")
_FRAC = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*(?P<top_sign>-?)(?P<top>[0-9,.]+)\s*\}|(?P<top_digit>[0-9]))\s*"
    r"(?:\{\s*(?P<bottom>[0-9,.]+)\s*\}|(?P<bottom_digit>[0-9]))"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}\\]*)\}")

APPROXIMATION_DECIMALS = 6
"""A decimal with at least this many places also equals a fraction that it is the rounded value of (0.333333 and 1/3)."""


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """A number as written. decimals: places after the point. percent: whether a percent sign follows."""

    value: Fraction
    decimals: int
    percent: bool


def tidy(answer: str) -> str:
    r"""Remove characters without a meaning from `answer`.

    These are `$`, spaces such as `\,`, `\left` and `\right`, the braces in `1{,}000`, an enclosing `\text{}`, and a period at
    the end. The Unicode minus becomes `-`.
    """
    text = answer.replace("−", "-").replace("{,}", ",").replace("\\$", "").replace("$", "")
    text = re.sub(r"(?<!\\)\\(?:(?:left|right)(?![a-zA-Z])|[,!;: ])", "", text)
    text = " ".join(text.split()).strip("* ").rstrip(".").strip()
    wrapped = _WRAPPED.fullmatch(text)
    return wrapped.group(1).strip() if wrapped else text


def plain_number(text: str) -> PlainNumber | None:
    r"""Parse a tidied `text` as one number; None if it is not: `1,000`, `-.5`, `72.0`, `1/2`, `\frac{1}{2}`, `1e-3`, `50%`.

    Exponents have at most three digits, so that no text yields a number too large to compute with.
    """
    percent = text.endswith("%")
    if percent:
        text = text[:-1].rstrip("\\ ")
    sign = -1 if text.startswith("-") else 1
    text = text[1:].lstrip() if text[:1] in ("-", "+") else text
    decimal = _decimal(text)
    if decimal is not None:
        return PlainNumber(sign * decimal[0], decimal[1], percent)
    match = _SLASHED.fullmatch(text) or _FRAC.fullmatch(text)
    if match is None:
        return None
    parts = match.groupdict()
    top = _decimal(parts["top"] or parts.get("top_digit") or "")
    bottom = _decimal(parts["bottom"] or parts.get("bottom_digit") or "")
    if top is None or bottom is None or bottom[0] == 0:
        return None
    if parts.get("sign") or parts.get("top_sign"):
        sign = -sign
    return PlainNumber(sign * top[0] / bottom[0], 0, percent)


def _decimal(text: str) -> tuple[Fraction, int] | None:
    """(value, decimal places) of an unsigned decimal."""
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    value = Fraction(match["mantissa"].replace(",", "").rstrip("."))
    exponent = int(match["exponent"] or 0)
    decimals = len(match["decimals"] or match["only_decimals"] or "")
    return value * Fraction(10) ** exponent, max(0, decimals - exponent)


def same_number(reference: PlainNumber, candidate: PlainNumber) -> bool:
    """Whether two numbers are equal as rationals.

    If only one side has a percent sign, both conventions match: `50%` equals 50 (the question asked "what percentage") and
    0.5. A long decimal equals the fraction that it is the rounded value of (see APPROXIMATION_DECIMALS).
    """
    values = {candidate.value}
    if reference.percent != candidate.percent:
        values.add(candidate.value / 100 if candidate.percent else candidate.value * 100)
    return any(_close(reference, candidate, value) for value in values)


def _close(reference: PlainNumber, candidate: PlainNumber, value: Fraction) -> bool:
    if reference.value == value:
        return True
    if candidate.decimals >= APPROXIMATION_DECIMALS and not _terminates(reference.value):
        return round(reference.value, candidate.decimals) == value
    if reference.decimals >= APPROXIMATION_DECIMALS and not _terminates(value):
        return round(value, reference.decimals) == reference.value
    return False


def _terminates(value: Fraction) -> bool:
    """Whether the decimal expansion is finite. If it is, a rounded value does not count as equal."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
