"""The calculator of examples/: what the model's calls return, and that none of them can do harm or raise."""

from __future__ import annotations

import json

import pytest

from etr_megatron.data.replies import read_tools
from examples.calculator import reply


def called(*expressions: object) -> list[str] | None:
    calls = "".join(
        f"<tool_call>\n{json.dumps({'name': 'calculate', 'arguments': {'expression': one}})}\n</tool_call>"
        for one in expressions
    )
    found = reply([{"role": "user", "content": "?"}, {"role": "assistant", "content": f"Hm. {calls}"}], "7", {})
    return None if found is None else [message["content"] for message in found if message["role"] == "tool"]


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("3 * (4 + 5)", "27"),
        ("-2 ** 2", "-4"),
        ("7 / 2", "3.5"),
        ("7 // 2 % 2", "1"),
        (" 2 ** 300 ", str(2**300)),
        ("0.1", "0.1"),
    ],
)
def test_an_expression_is_evaluated(expression, result):
    assert called(expression) == [result]


@pytest.mark.parametrize(
    "expression",
    [
        "1 / 0",
        "9 ** 9 ** 9",
        "10 ** 299 * 10 ** 9",
        "(-1) ** 0.5",
        "__import__('os').system('true')",
        "'a' * 9",
        "1 +",
        "True",
        "(" * 300,
        7,
        None,
    ],
)
def test_what_cannot_be_evaluated_is_told_to_the_model(expression):
    (said,) = called(expression)
    assert said.startswith("error: ") and len(said) > len("error: ")


def test_every_call_of_a_turn_gets_a_message_and_a_turn_without_a_call_is_the_answer():
    assert called("1 + 1", "2 + 2") == ["2", "4"]
    assert called() is None
    (message,) = reply([{"role": "assistant", "content": "<tool_call>nonsense</tool_call>"}], "7", {})
    assert message["role"] == "tool" and message["content"].startswith("error: ")


def test_the_schemas_describe_the_call():
    (tool,) = read_tools("examples/calculator.json")
    assert tool["function"]["name"] == "calculate" and tool["function"]["parameters"]["required"] == ["expression"]
