"""Rewards of the user's own: what they are given, what they may return, and their mistakes."""

from __future__ import annotations

import psutil
import pytest

from etr_megatron.config import RewardConfig
from etr_megatron.errors import UserError
from etr_megatron.reward import Grade, GradeRequest, GraderPool
from tests.graders import NO_NUMBER, NOT_TO_BE_SHOWN, request

pytestmark = pytest.mark.usefixtures("deadline")


def test_of_a_dict_the_score_is_the_reward_and_other_numbers_are_parts(user_rewards):
    answers = [
        "{'score': 0.5, 'acc': True, 'format': 0.25, 'pred': 'x', 'nan': float('nan'), 'none': None, 'n': 10**400, (1, 2): 3}",
        "{'acc': 1.0}",
        "{'score': None, 'acc': 1.0}",
        "{'score': 7, 'acc': 1.0}",
    ]
    with GraderPool(RewardConfig(function=user_rewards, workers=1, timeout_s=60)) as pool:
        first, *others = pool.grade([request(answer) for answer in answers])
    assert first == Grade(0.5, "ok", "", {"acc": 1.0, "format": 0.25, "(1, 2)": 3.0})
    assert [grade.status for grade in others] == ["error", "error", "out_of_range"]
    assert others[0].detail == "my_rewards:by_command returned a dict without `score`, which is the reward"
    assert not any(grade.parts for grade in others)


OF_COLUMNS = """
def by_level(prompt, response, answer, columns):
    return columns["extra_info.level"] * (response == columns["data_source"])
"""


def test_a_reward_of_the_users_own_is_given_the_columns_that_the_config_names(user_rewards, tmp_path):
    (tmp_path / "of_columns.py").write_text(OF_COLUMNS)
    config = RewardConfig(function="of_columns:by_level", columns=("data_source", "extra_info.level"), range_max=9.0)
    extra = {"data_source": "größer", "extra_info.level": 7}
    with GraderPool(config) as pool:
        assert pool.grade([GradeRequest("?", "größer", "", extra)]) == [Grade(7.0, "ok", "")]
    with pytest.raises(UserError, match="callable with four arguments, the prompt, the response, the answer and a dict of"):
        GraderPool(RewardConfig(function=user_rewards, columns=("data_source",)))
    with pytest.raises(UserError, match="callable with three arguments"):
        GraderPool(RewardConfig(function="of_columns:by_level"))


def test_a_users_mistakes_are_errors_of_their_answers(user_rewards):
    config = RewardConfig(function=user_rewards, workers=1, range_min=-1.0)
    values = ("float('inf')", "-float('inf')", "float('nan')", "'1'", "b'1'", "None")
    responses = ["raise", *values, "sys.exit", NOT_TO_BE_SHOWN, NO_NUMBER, "True", "print", "torch"]
    with GraderPool(config) as pool:
        grades = pool.grade([request(response) for response in responses])
    assert [grade.status for grade in grades] == ["error"] * 10 + ["ok"] * 3
    assert " raised SystemExit: 3 (" in grades[7].detail
    assert [grade.reward for grade in grades] == [-1.0] * 10 + [1.0, 0.25, 0.0]
    assert "ValueError: no such thing" in grades[0].detail
    assert "returned inf, which is not a finite number" in grades[1].detail
    assert "returned None, which is not a finite number" in grades[6].detail
    assert all(grade.detail.endswith(", which is not a finite number") for grade in (*grades[1:7], *grades[8:10]))


def test_a_reward_outside_its_range_is_told_from_a_failure_and_rounding_from_both(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=1, range_max=3.0)) as pool:
        grades = pool.grade([request(one) for one in ["4", "3.1", "-0.1", "3.000001", "-1e-7", "2.9999999"]])
    assert [grade.status for grade in grades] == ["out_of_range"] * 3 + ["ok"] * 3
    assert [grade.reward for grade in grades] == [0.0, 0.0, 0.0, 3.0, 0.0, 2.9999999]
    assert grades[0].detail.endswith("returned 4.0, outside reward.range_min = 0.0 to reward.range_max = 3.0")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("my_rewards:absent", "has no absent"),
        ("my_rewards:not_callable", "not callable"),
        ("my_rewards:of_two", "must be callable with three arguments"),
        ("exits:f", "ended while starting (exit code 3)"),
    ],
)
def test_a_reward_that_cannot_be_loaded_stops_the_job_and_leaves_nothing(user_rewards, tmp_path, function, why):
    (tmp_path / "exits.py").write_text("import os\nos._exit(3)\n")
    children = set(psutil.Process().children())
    with pytest.raises(UserError) as caught:
        GraderPool(RewardConfig(function=function))
    assert f'reward.function = "{function}"' in str(caught.value)
    assert why in str(caught.value)
    assert set(psutil.Process().children()) <= children


def test_a_reward_in_the_working_directory_is_found_where_python_does_not_look_by_itself(user_rewards, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with GraderPool(RewardConfig(function=user_rewards, workers=1)) as pool:
        assert pool.grade([request("0.5")]) == [Grade(0.5, "ok", "")]


OF_MESSAGES = """
def by_name(prompt, response, answer, *, messages):
    assert [message["role"] for message in messages] == ["user", "assistant"] and messages[0]["content"] == prompt
    return float(messages[-1]["content"])
def behind(prompt, response, answer, messages=None):
    return by_name(prompt, response, answer, messages=messages)
def behind_columns(prompt, response, answer, columns, messages):
    return columns["level"] + by_name(prompt, response, answer, messages=messages)
def only_positional(prompt, response, answer, messages=None, /):
    return 0.0 if messages is None else 1.0
def of_any(prompt, response, answer, **named):
    return float(len(named))
"""


def test_a_reward_with_a_parameter_for_messages_is_given_them_by_name(user_rewards, tmp_path):
    (tmp_path / "of_messages.py").write_text(OF_MESSAGES)
    dialogue = GradeRequest(
        "?", "7", "", {"level": 1.0}, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "7"}]
    )
    single = GradeRequest("?", "0.5", "", {"level": 1.0})

    def rewards(function: str, **config: tuple[str, ...]) -> list[float]:
        with GraderPool(RewardConfig(function=f"of_messages:{function}", workers=1, range_max=9.0, **config)) as pool:
            return [grade.reward for grade in pool.grade([dialogue, single])]

    assert rewards("by_name") == rewards("behind") == [7.0, 0.5]
    assert rewards("behind_columns", columns=("level",)) == [8.0, 1.5]
    assert rewards("only_positional") == rewards("of_any") == [0.0, 0.0]
    for function, config in (("behind", {"columns": ("level",)}), ("behind_columns", {})):  # messages would be the columns
        with pytest.raises(UserError, match="besides `messages`, given by name"):
            rewards(function, **config)
