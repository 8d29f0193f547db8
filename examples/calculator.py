"""An environment: a calculator that the model calls in Qwen's format, `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.

environment.function=examples.calculator:reply environment.role=tool data.tools=examples/calculator.json
"""

from __future__ import annotations

import ast
import json
import operator
import re
from typing import Any

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_MAX_DIGITS = 300


def reply(messages: list[dict[str, str]], answer: str, columns: dict[str, Any]) -> list[dict[str, str]] | None:
    """Return a message for every call in the model's turn; None if the turn has no call, because it is then the answer."""
    calls = _CALL.findall(messages[-1]["content"])
    return [{"role": "tool", "content": _result(call)} for call in calls] or None


def _result(call: str) -> str:
    """Return the result, or an error text for the model to read: a mistake of the model must not raise an exception."""
    try:
        expression = json.loads(call)["arguments"]["expression"]
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ) as error:
        return f"error: {error or type(error).__name__}"


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _small(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > _MAX_DIGITS:
            raise ValueError(f"exponents must be at most {_MAX_DIGITS}")
        return _small(_OPERATORS[type(node.op)](left, right))
    raise ValueError("only numbers, parentheses and + - * / // % ** are allowed")


def _small(number: Any) -> int | float:
    if isinstance(number, complex) or abs(number) >= 10**_MAX_DIGITS:
        raise ValueError(f"numbers must be real and have at most {_MAX_DIGITS} digits")
    return number
