r"""Find the answer in a response: `\boxed{}`, after `####`, or the last number. Plain regular expressions, linear time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

MAX_ANSWER_CHARS = 500
"""A longer "answer" counts as wrong instead of being parsed."""

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASH = re.compile(r"####[ \t]*([^\n]*)")
_UNSIGNED = r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?|\.[0-9]+"
_NUMBER_AND_UNIT = re.compile(r"(\$?[-−]?[0-9][0-9,]*(?:\.[0-9]+)?)\s+[A-Za-z][A-Za-z .]+")
# A sign counts unless it subtracts from something before it: "10-5" ends with 5, "= -5" with -5.
_SIGN = r"(?:(?<![\w)\]}.])[-−+])?"
_LAST_NUMBER = re.compile(
    rf"{_SIGN}(?:\\[dt]?frac\{{[-−]?[0-9]+\}}\{{[0-9]+\}}|(?:{_UNSIGNED})(?:/[0-9]+(?![0-9/]|\.[0-9]))?)(?:\s?\\?%)?"
)


def boxed(text: str) -> str | None:
    r"""Content of the last closed `\boxed{...}` (or `\fbox`), with balanced braces; `\boxed 5` is 5."""
    return _last_box(text, 0, len(text), _closing_braces(text)) if _BOXED.search(text) else None


def _last_box(text: str, start: int, stop: int, closing: dict[int, int]) -> str | None:
    """`boxed` of `text[start:stop]`. If a box starts with another box, the content of the inner box."""
    found: str | None = None
    position = start
    while (match := _BOXED.search(text, position, stop)) is not None:
        position = match.end()
        if text.startswith("{", position):
            end = closing.get(position)
            if end is not None:
                content = text[position + 1 : end].strip()
                inner = _last_box(text, position + 1, end, closing) if _BOXED.match(content) else content
                found, position = inner or found, end + 1
        elif match.group()[-1].isspace():
            found = re.split(r"[\s$.,]", text[position : min(stop, position + MAX_ANSWER_CHARS)], maxsplit=1)[0] or found
    return found


def _closing_braces(text: str) -> dict[int, int]:
    """Position of each opening brace -> that of its closing brace, unless they are too far apart for an answer. Ignores escaped
    braces."""
    closing: dict[int, int] = {}
    open_at: list[int] = []
    for match in _BRACE.finditer(text):
        if match.group() == "{":
            open_at.append(match.start())
        elif match.group() == "}" and open_at:
            start = open_at.pop()
            if match.start() - start < MAX_ANSWER_CHARS * 4:
                closing[start] = match.start()
    return closing


def after_hash(text: str) -> str | None:
    """The rest of the line after the last `####`, without a period at its end.

    If it is a number with a unit in words ("72 dollars"), only the number, as in GSM8K's own evaluation.
    """
    matches = _HASH.findall(text)
    answer = matches[-1].strip().strip("*").rstrip(".").strip() if matches else ""
    with_unit = _NUMBER_AND_UNIT.fullmatch(answer[:MAX_ANSWER_CHARS])
    return (with_unit.group(1) if with_unit else answer) or None


def last_number(text: str) -> str | None:
    r"""The last number as written: sign, thousands separators, decimals, `a/b` or `\frac{a}{b}`, exponent, percent."""
    last: re.Match[str] | None = None
    for match in _LAST_NUMBER.finditer(text):
        last = match
    return last.group().strip() if last is not None else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {"boxed": boxed, "hash": after_hash, "last_number": last_number}


def extract_answer(text: str, order: Sequence[str]) -> str | None:
    """The answer of the first extractor in `order` (`boxed`, `hash`, `last_number`) that finds one, or None.

    Raises KeyError for an unknown name.
    """
    for name in order:
        answer = EXTRACTORS[name](text)
        if answer is not None:
            return answer
    return None


def reference_answer(text: str, order: Sequence[str]) -> str:
    r"""The bare reference answer. It follows a worked solution and `####` in data such as GSM8K; other data has `\boxed`.

    A text without a marker is the answer itself. In a text with both markers, `order` decides.
    """
    markers = [name for name in order if name != "last_number"]
    markers += [name for name in ("hash", "boxed") if name not in markers]
    return extract_answer(text, markers) or text.strip()
