"""The training and held-out problems of a run, from the sources that its config names."""

from __future__ import annotations

import pytest

from etr_megatron import problem_sets
from etr_megatron.errors import UserError
from etr_megatron.problem_sets import open_sets
from tests.batches import config
from tests.test_data_sources import byte_tokenizer, write_jsonl


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_sets, "on_rank0", lambda body: body())


def test_training_sets_are_joined_and_held_out_sets_kept_apart_and_what_is_left_out_is_told(
    tmp_path, capsys: pytest.CaptureFixture[str]
):
    row = {"question": "1+1?", "answer": "2", "level": 3}
    first = write_jsonl(tmp_path / "a.jsonl", [row, "broken", "broken", row | {"question": 99 * "long"}, row])
    second = write_jsonl(tmp_path / "b.jsonl", [row])
    held_out = write_jsonl(tmp_path / "c.jsonl", [row, row, row])
    sets = (f"data.train={{x: {first}, y: {second}}}", f"data.eval={{z: {held_out}, y: {second}}}", "eval.problems=2")
    reading = ("data.on_bad_row=skip", "data.max_prompt_tokens=100", "reward.function=my:f", "reward.columns=[level]")
    problems, asked = open_sets(config(*sets, *reading), byte_tokenizer(), report=True)
    assert [one.id for one in problems] == ["x/a.jsonl:1", "x/a.jsonl:5", "y/b.jsonl:1"]
    assert {name: [one.id for one in own] for name, own in asked.sets.items()} == {
        "z": ["z/c.jsonl:1", "z/c.jsonl:2"],
        "y": ["y/b.jsonl:1"],
    }
    assert all(one.extra == {"level": 3} for one in [*problems, *asked.problems])
    assert capsys.readouterr().err == (
        "data.train.x: 2 problems; left out 1 over data.max_prompt_tokens=100 and 2 broken rows\n"
    )
    open_sets(config(*sets, *reading), byte_tokenizer(), report=False)
    assert capsys.readouterr().err == ""


def test_a_reward_column_may_be_lacking_in_some_of_several_training_sets_which_are_named_but_not_in_all(
    tmp_path, capsys: pytest.CaptureFixture[str]
):
    row = {"question": "?", "answer": "1"}
    verl = write_jsonl(tmp_path / "v.jsonl", [row | {"extra_info": {"tests": [2]}}, row])
    plain = write_jsonl(tmp_path / "p.jsonl", [row])
    sets = (f"data.train={{code: {verl}, maths: {plain}, sums: arithmetic}}", "data.eval=null", "reward.function=my:f")
    problems, _ = open_sets(config(*sets, "reward.columns=[extra_info.tests]"), byte_tokenizer(), report=True)
    assert [one.extra["extra_info.tests"] for one in problems[:4]] == [[2], None, None, None]
    assert capsys.readouterr().err == ("data.train: no values in a column 'extra_info.tests' (reward.columns) of maths, sums\n")
    with pytest.raises(UserError, match=r"^reward\.columns: no training set has values in a column 'extra_info\.test'; "):
        open_sets(config(*sets, "reward.columns=[extra_info.tests, extra_info.test]"), byte_tokenizer(), report=False)
    assert capsys.readouterr().err == ""
