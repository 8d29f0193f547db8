"""Symbolic equality of two untrusted LaTeX answers with math-verify. Import it only in a grader process.

These measures keep model output away from `eval`, which `sympy.sympify` and `parse_expr` use:

1. Answers are parsed only by math-verify's LaTeX path (an ANTLR grammar that builds SymPy objects). Its other path,
   `ExprExtractionConfig`, passes text to `parse_expr` and is not used.
2. The LaTeX path still reads number tokens through `sympify`. On import, this module replaces SymPy's string parser by one
   that accepts only decimal literals and single names, so no text reaches `eval` through SymPy.
3. While an answer is being compared, an audit hook refuses to compile or run code from a string, start processes or
   connect sockets, whatever the caller. Hooks cannot be removed: another reason to stay out of the trainer's process.

If an answer takes forever (`9^{9^{9}}`) or exhausts memory, the pool kills the process.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import math_verify
import math_verify.parser
import sympy
import sympy.parsing
import sympy.parsing.sympy_parser
from latex2sympy2_extended import latex2sympy2

_DECIMAL_LITERAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)", re.ASCII)


_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
_LATEX_ONLY = [math_verify.LatexExtractionConfig()]


class RefusedError(RuntimeError):
    """Text would have been run as code."""


def _parse_literal(text: str, *_args: Any, **_kwargs: Any) -> sympy.Expr:
    """Replaces `sympy.parse_expr`; accepts only decimal literals and names (SymPy creates its own units from names)."""
    text = text.strip()
    if _NAME.fullmatch(text):
        return sympy.Symbol(text)
    if not _DECIMAL_LITERAL.fullmatch(text):
        raise RefusedError("only decimal literals and names may be parsed from text")
    return sympy.Float(text) if "." in text else sympy.Integer(int(text))


for _module in (sympy, sympy.parsing, sympy.parsing.sympy_parser, math_verify.parser, latex2sympy2):
    _module.parse_expr = _parse_literal

_comparing = False
_REFUSED_EVENTS = frozenset(
    {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect"}
)
# Modules that generate code from class and variable counts or constants, never from an answer. `lambdify` is not among them:
# SymPy uses it for roots without a closed form, so an answer with such roots equals only an identical text.
_TRUSTED_WRITERS = frozenset({"collections", "dataclasses", "sympy.abc", "sympy.polys.monomials"})


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _comparing:
        return
    if event in _REFUSED_EVENTS:
        raise RefusedError(f"{event} while an answer is compared")
    if event == "compile":
        from_text = args[1] in ("<string>", b"<string>")
    elif event == "exec":
        from_text = getattr(args[0], "co_filename", "") == "<string>"
    else:
        return
    if from_text and sys._getframe(1).f_globals.get("__name__") not in _TRUSTED_WRITERS:
        raise RefusedError(f"{event} of text while an answer is compared")


sys.addaudithook(_audit)

for _name in ("math_verify", "latex2sympy2_extended"):
    # These libraries warn about their timeouts, which are disabled on purpose, and about every text that they cannot parse.
    logging.getLogger(_name).setLevel(logging.ERROR)


@contextmanager
def comparing() -> Iterator[None]:
    """Enable the audit hook inside the block."""
    global _comparing
    _comparing = True
    try:
        yield
    finally:
        _comparing = False


def symbolically_equal(reference: str, candidate: str) -> bool:
    """Whether math-verify finds `candidate` equal to `reference` (expressions, sets, intervals, matrices, equations).

    Both are LaTeX without delimiters; the caller bounds their length. Text that does not parse equals only itself.
    For some inputs this never returns; the pool's time limit ends them.
    """
    with comparing():
        return bool(math_verify.verify(_parse(reference), _parse(candidate), timeout_seconds=None))


def _parse(latex: str) -> list[Any]:
    one_line = " ".join(latex.replace("$", " ").split())
    return math_verify.parse(f"${one_line}$", extraction_config=_LATEX_ONLY, parsing_timeout=None)


def warm_up() -> None:
    """Build grammars and regular expressions, and import lazy parts of SymPy, so that this does not count against the time
    limit of the first answer.

    Raises RuntimeError if math-verify does not recognize equal answers.
    """
    for reference, candidate in ((r"\frac{x^2-1}{x-1}", "x+1"), (r"\{1,2\}", r"\{2,1\}"), ("(0,1]", "(0,1]")):
        if not symbolically_equal(reference, candidate):
            raise RuntimeError(f"math-verify does not find {candidate} equal to {reference}")
