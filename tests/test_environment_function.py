"""A user's environment: what it is given, what it may return, and its mistakes."""

from __future__ import annotations

import json
import re

import psutil
import pytest

from etr_megatron.config import EnvironmentConfig
from etr_megatron.environment import load_environment
from etr_megatron.errors import UserError
from etr_megatron.imports import ImportPathError
from tests.environments import OK, all_replies, answers, ask, pool_of, said

pytestmark = pytest.mark.usefixtures("deadline")


def test_a_reply_is_text_a_message_or_several_and_none_ends_the_response(user_environment):
    tool = {"role": "tool", "content": "4"}
    with pool_of(user_environment, role="simulator") as pool:
        replies = answers(pool, "'hi'", "''", repr(tool), repr([tool, {**tool, "content": "5"}]), "None")
    assert replies[:2] == [said("hi", role="simulator"), said("", role="simulator")]
    assert replies[2:] == [said("4", role="tool"), said("4", "5", role="tool"), OK]


def test_it_is_given_the_messages_the_answer_and_the_columns_and_one_thread(user_environment, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "repr([[m['role'] for m in messages], answer, columns, os.environ['OMP_NUM_THREADS'], 'torch' in sys.modules])"
    with pool_of(user_environment) as pool:
        pool.submit(3, ask(code, "größer \ud800", level=[1, {"a": None}]))
        ((key, reply),) = pool.poll(600.0)
    assert key == 3 and reply.messages is not None
    roles, answer, *rest = eval(reply.messages[0]["content"])
    assert (roles, answer) == (["user", "assistant"], "größer \ud800")
    assert rest == [{"level": [1, {"a": None}]}, "1", False]


def test_keys_of_a_message_that_say_nothing_are_left_out(user_environment):
    message = {"role": "tool", "content": "4", "name": None, "tool_calls": [], "refusal": "", "annotations": {}}
    with pool_of(user_environment) as pool:
        assert answers(pool, repr(message)) == [said("4", role="tool")]


WRONG = {
    "3": "returned 3, which is not text, a list of chat messages, or None",
    "True": "which is not text",
    "b'x'": "which is not text",
    "('a', True)": "which is not text",
    "[]": "returned [], which has no message; None ends a response",
    "['hi']": "in which a message is not a dict with `role` and `content`, both text",
    "{}": "in which a message is not a dict with `role` and `content`, both text",
    "{'role': 'user', 'content': None}": "both text",
    "{'content': 'x'}": "both text",
    "[{'role': 'user', 'content': 'x'}, None]": "both text",
    "{'role': '', 'content': 'x'}": "in which a message has an empty role",
    "{'role': 'tool', 'content': 'x', 'tool_call_id': 7}": "in which a message has `tool_call_id`, but only",
    "{'role': 'tool', 'content': 'x', 'score': 0}": "in which a message has `score`, but only",
    "'\\ud800'": "half a surrogate pair",
    "type('Odd', (), {'__repr__': lambda self: 1 / 0})()": "which is not text",
}


def test_anything_else_that_it_returns_is_an_error_in_one_sentence(user_environment):
    with pool_of(user_environment) as pool:
        replies = answers(pool, *WRONG)
    for reply, why in zip(replies, WRONG.values(), strict=True):
        assert (reply.messages, reply.status) == (None, "error") and why in reply.detail
        assert reply.detail.startswith(f"{user_environment} returned ")


def test_what_it_raises_is_an_error_and_what_it_prints_is_not_read_as_a_reply(user_environment):
    errors = {
        "fail(ValueError('no such thing'))": "ValueError: no such thing",
        "sys.exit(3)": "SystemExit: 3",
        "fail(asyncio.CancelledError())": "CancelledError",
        "type('Odd', (dict,), {'get': lambda *_: 1 / 0})()": "ZeroDivisionError: division by zero",
        "fail(type('Mute', (ValueError,), {'__str__': lambda _: 1 / 0})())": "Mute",
    }
    with pool_of(user_environment) as pool:
        pids = pool.worker_pids
        *failed, noise, after = answers(pool, *errors, "noise()", "'on'")
        assert pool.worker_pids == pids
    said_of = [f"{user_environment} raised {error}" for error in errors.values()]
    assert all((reply.messages, reply.status) == (None, "error") for reply in failed)
    assert failed[3].detail == said_of[3]  # not in a line of the user's module
    for reply, start in zip(failed[:3], said_of[:3], strict=True):
        assert re.fullmatch(re.escape(start) + r" \(my_environment\.py:\d+\)", reply.detail)
    assert failed[0].detail[-5:] == failed[2].detail[-5:] != failed[1].detail[-5:]  # the line in `fail`, and the caller's
    assert (noise, after) == (said("quiet"), said("on"))


def test_an_async_function_keeps_its_event_loop_also_after_what_it_raises(user_environment):
    check_event_loop(user_environment.replace("by_command", "later"))


def test_so_does_one_behind_a_plain_function(user_environment):
    check_event_loop(user_environment.replace("by_command", "wrapped"))


def check_event_loop(function: str) -> None:
    errors = ("fail(KeyError('x'))", "sys.exit(3)", "fail(asyncio.CancelledError())")
    with pool_of(function) as pool:
        pids = pool.worker_pids
        replies = answers(pool, "'a'", errors[0], "'b'", errors[1], "'c'", errors[2], "'d'", "None")
        assert pool.worker_pids == pids
    assert [*replies[:7:2], replies[7]] == [*map(said, "abcd"), OK]
    assert [reply.detail.partition(" raised ")[2].rpartition(" (")[0] for reply in replies[1:7:2]] == [
        "KeyError: 'x'",
        "SystemExit: 3",
        "CancelledError",
    ]


def test_what_an_environment_changes_of_its_messages_is_seen_by_nobody(user_environment):
    request = ask("messages.clear() or 'done'")
    before = json.dumps(request.messages)
    with pool_of(user_environment) as pool:
        pool.submit(0, request)
        assert all_replies(pool) == {0: said("done")} and json.dumps(request.messages) == before


def test_a_loaded_environment_is_a_function_of_requests(user_environment, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    environment = load_environment(EnvironmentConfig(function=user_environment))
    assert environment(ask("answer + columns['a']", "5", a="6")) == said("56")
    with pytest.raises(ImportPathError, match=r"three arguments, the messages, the answer and a dict of reward\.columns"):
        load_environment(EnvironmentConfig(function=user_environment.replace("by_command", "of_two")))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("my_environment:absent", "has no absent"),
        ("my_environment:OK", "has no OK"),
        ("my_environment:lock", "not callable"),
        ("my_environment:of_two", "must be callable with three arguments"),
        ("exits:f", "an environment process ended while starting (exit code 3)"),
    ],
)
def test_an_environment_that_cannot_be_loaded_stops_the_job_and_leaves_nothing(user_environment, tmp_path, function, why):
    (tmp_path / "exits.py").write_text("import os\nos._exit(3)\n")
    children = set(psutil.Process().children())
    with pytest.raises(UserError) as caught:
        pool_of(function, workers=3)
    assert f'environment.function = "{function}" cannot be used: ' in str(caught.value)
    assert why in str(caught.value)
    assert set(psutil.Process().children()) <= children


def test_a_parameter_named_response_id_gets_the_responses_name(tmp_path, monkeypatch):
    (tmp_path / "my_sandbox.py").write_text(
        "def f(messages, answer, columns, *, response_id):\n    return f'{response_id} {answer}'\n"
        "def g(messages, answer, response_id):\n    return ''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reply = load_environment(EnvironmentConfig(function="my_sandbox:f"))(ask("", "4"))
    assert reply == said("p@5/3 4")
    with pytest.raises(ImportPathError, match=r"and a dict of reward\.columns, besides `response_id`, given by name"):
        load_environment(EnvironmentConfig(function="my_sandbox:g"))
