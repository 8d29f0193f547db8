"""Rows of other datasets: other column names, nested columns, chat messages, and columns for a custom reward."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etr_megatron.config import DataConfig, Source, load_config, sources_of
from etr_megatron.config.schema import ArithmeticConfig
from etr_megatron.data import ProblemSet, check_tokenizer, open_problems
from etr_megatron.errors import UserError
from tests.test_data_sources import CHAT_TEMPLATE, byte_tokenizer, write_jsonl

CHAT = byte_tokenizer(CHAT_TEMPLATE)
PLAIN = byte_tokenizer()


def opened(source: str, tokenizer=PLAIN, extra: tuple[str, ...] = (), *, held_out=False, **settings: object) -> ProblemSet:
    config = DataConfig(train=source, eval=source, **settings)
    return open_problems(sources_of(config)[held_out], config, ArithmeticConfig(), tokenizer, extra)


VERL = {
    "data_source": "math",
    "prompt": [{"role": "user", "content": "6 times 7?"}],
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"index": 7, "level": None},
}


def test_a_nested_column_is_named_with_dots(tmp_path):
    source = write_jsonl(tmp_path / "v.jsonl", [VERL])
    columns = {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth", "id_column": "extra_info.index"}
    (problem,) = opened(source, **columns)
    assert (problem.id, problem.prompt, problem.answer) == ("7", "6 times 7?", "42")
    with pytest.raises(UserError) as caught:
        opened(source, **{**columns, "answer_column": "reward_model.truth"})
    assert str(caught.value).endswith(
        "has no column 'reward_model.truth' (data.answer_column); its columns are 'data_source', 'prompt', 'reward_model', "
        "'reward_model.style', 'reward_model.ground_truth', 'extra_info', 'extra_info.index', 'extra_info.level'"
    )


def test_a_parquet_file_of_nested_columns_and_messages_is_read_alike(tmp_path):
    pq.write_table(pa.Table.from_pylist([VERL, VERL | {"extra_info": None}]), tmp_path / "v.parquet")
    first, second = opened(
        str(tmp_path / "v.parquet"),
        extra=("data_source", "extra_info.index", "extra_info.level"),
        prompt_column="prompt",
        answer_column="reward_model.ground_truth",
    )
    assert (first.prompt, first.answer) == (second.prompt, second.answer) == ("6 times 7?", "42")
    assert first.extra == {"data_source": "math", "extra_info.index": 7, "extra_info.level": None}
    assert second.extra == {"data_source": "math", "extra_info.index": None, "extra_info.level": None}


def test_a_column_with_a_dot_in_its_own_name_comes_before_a_nested_one(tmp_path):
    row = {"question": "?", "a.b": "direct", "a": {"b": "nested", "c.d": {"e": "of both"}}}
    source = write_jsonl(tmp_path / "d.jsonl", [row])
    assert opened(source, answer_column="a.b")[0].answer == "direct"
    assert opened(source, answer_column="a.c.d.e")[0].answer == "of both"


def test_a_row_in_which_what_should_be_nested_is_text_is_broken(tmp_path):
    rows = [{"question": "?", "a": {"b": "1"}}, {"question": "?", "a": "1"}, {"question": "?", "a": None}]
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError, match=r"d\.jsonl:2 .*column 'a\.b' is missing"):
        opened(source, answer_column="a.b")
    assert len(opened(source, answer_column="a.b", on_bad_row="skip")) == 1


def test_of_several_columns_each_source_takes_the_first_that_it_has(tmp_path):
    train = write_jsonl(tmp_path / "t.jsonl", [{"solution": "s", "problem": "p", "question": "q"}])
    held_out = write_jsonl(tmp_path / "e.jsonl", [{"question": "q", "answer": "a", "solution": "s"}])
    settings = {"prompt_column": ("problem", "question"), "answer_column": ("answer", "solution")}
    assert [(p.prompt, p.answer) for p in opened(train, **settings)] == [("p", "s")]
    assert [(p.prompt, p.answer) for p in opened(held_out, **settings)] == [("q", "a")]
    with pytest.raises(UserError, match=r"no column 'text' or 'input' \(data\.prompt_column\); its columns are 'solution'"):
        opened(train, prompt_column=("text", "input"), answer_column="solution")


def test_a_column_that_only_some_rows_have_is_not_looked_for_under_another_name(tmp_path):
    """Otherwise a row without an answer would be trained on with the value of another column."""
    source = write_jsonl(tmp_path / "t.jsonl", [{"question": "q", "answer": "a"}, {"question": "q", "solution": "s"}])
    with pytest.raises(UserError, match=r"t\.jsonl:2 .*column 'answer' is missing"):
        opened(source, answer_column=("answer", "solution"))


CONVERSATION = [
    {"role": "user", "content": "Add 1 and 2."},
    {"role": "assistant", "content": "3", "name": None},
    {"role": "user", "content": "And 4?"},
]


def chat_row(*messages: object) -> dict[str, object]:
    return {"question": list(messages), "answer": "7"}


def test_chat_messages_go_through_the_chat_template_and_not_into_the_prompt_template(tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", [chat_row(*CONVERSATION), {"question": "And 5?", "answer": "8"}])
    chat, text = opened(source, CHAT, prompt_template="{prompt} Use \\boxed{}.", system_prompt="Be brief.")
    assert (chat.prompt, text.prompt) == ("And 4?", "And 5? Use \\boxed{}.")
    assert CHAT.decode(chat.prompt_ids) == "<system>Be brief.<user>Add 1 and 2.<assistant>3<user>And 4?<assistant>"
    assert CHAT.decode(text.prompt_ids) == "<system>Be brief.<user>And 5? Use \\boxed{}.<assistant>"


def test_a_system_message_of_the_rows_own_stands_in_place_of_the_configs(tmp_path):
    own = {"role": "system", "content": "Think."}
    source = write_jsonl(tmp_path / "s.jsonl", [chat_row(own, CONVERSATION[0]), chat_row(CONVERSATION[0])])
    first, second = opened(source, CHAT, system_prompt="Be brief.")
    assert CHAT.decode(first.prompt_ids) == "<system>Think.<user>Add 1 and 2.<assistant>"
    assert CHAT.decode(second.prompt_ids) == "<system>Be brief.<user>Add 1 and 2.<assistant>"


def test_without_a_chat_template_a_single_message_is_its_text_and_several_are_refused(tmp_path):
    one = write_jsonl(tmp_path / "o.jsonl", [chat_row(CONVERSATION[0])])
    assert PLAIN.decode(opened(one)[0].prompt_ids) == "Add 1 and 2."
    several = write_jsonl(tmp_path / "s.jsonl", [chat_row(CONVERSATION[0]), chat_row(*CONVERSATION)])
    for tokenizer, settings in ((PLAIN, {}), (CHAT, {"chat_template": False})):
        with pytest.raises(UserError, match=r"a prompt has several chat messages but no chat template applies \("):
            opened(several, tokenizer, **settings)
    with pytest.raises(UserError, match=r"data\.system_prompt is set but no chat template applies \("):
        opened(one, system_prompt="Be brief.")


def test_keys_of_a_message_that_say_nothing_are_passed_over(tmp_path):
    message = CONVERSATION[0] | {"name": None, "tool_calls": [], "refusal": ""}
    assert PLAIN.decode(opened(write_jsonl(tmp_path / "o.jsonl", [chat_row(message)]))[0].prompt_ids) == "Add 1 and 2."


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "is an empty list, not text or chat messages"),
        (["text"], "message 1 of column 'question' is not an object with `role` and `content`, both text"),
        ([{"role": "user"}], "message 1 of column 'question' is not an object with"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "?"}]}],
            "message 1 of column 'question' is not an object with",
        ),
        ([{"role": "user", "content": " "}], "message 1 of column 'question' is empty"),
        ([{"role": "user", "content": "\ud83d"}], "message 1 of column 'question' has half a surrogate pair"),
        (
            [{"role": "human", "content": "?"}],
            "message 1 of column 'question' has the role 'human', which is not one of system, user",
        ),
        ([CONVERSATION[0] | {"tool_calls": [1]}], "message 1 of column 'question' has `tool_calls`, but only `role`"),
        (CONVERSATION[:2], "the last message of column 'question' has the role assistant, not user"),
        ([{"role": "system", "content": "Think."}], "the last message of column 'question' has the role system, not user"),
    ],
)
def test_messages_that_cannot_be_asked_are_a_broken_row(tmp_path, messages, reason):
    source = write_jsonl(tmp_path / "b.jsonl", [chat_row(CONVERSATION[0]), chat_row(*messages)])
    with pytest.raises(UserError, match=r"b\.jsonl:2 .*on_bad_row=skip") as caught:
        opened(source, CHAT)
    assert reason in str(caught.value)
    assert opened(source, CHAT, on_bad_row="skip").skipped_broken == 1


def test_further_columns_are_kept_as_the_grader_gets_them(tmp_path):
    rows = [{"question": "?", "answer": "1", "tests": [{"in": 1}], "2": None}, {"question": "?", "answer": "1", "2": 0.5}]
    first, second = opened(write_jsonl(tmp_path / "x.jsonl", rows), extra=("tests", "2"))
    assert first.extra == {"tests": [{"in": 1}], "2": None}
    assert second.extra == {"tests": None, "2": 0.5}


def test_a_further_column_may_be_lacking_in_a_held_out_set_and_where_problems_are_generated_but_not_in_training(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [{"question": "?", "answer": "1"}])
    for place, held_out in ((source, True), ("arithmetic", True), ("arithmetic", False)):
        assert opened(place, extra=("level",), held_out=held_out)[0].extra == {"level": None}
    with pytest.raises(UserError, match=r"no column 'level' \(reward\.columns\); its columns are 'question', 'answer'"):
        opened(source, extra=("answer", "level"))


def test_what_cannot_be_given_to_a_grader_or_recorded_is_a_broken_row(tmp_path):
    table = {"question": ["?"], "answer": ["1"], "when": [datetime.datetime(2024, 2, 29)]}
    pq.write_table(pa.table(table), tmp_path / "w.parquet")
    with pytest.raises(UserError, match=r"w\.parquet:1 .*column 'when' cannot be given to a reward function as JSON"):
        opened(str(tmp_path / "w.parquet"), extra=("when",))
    assert len(opened(str(tmp_path / "w.parquet"))) == 1
    for number, value in enumerate((float("nan"), {"a": "\ud83d"})):
        source = write_jsonl(tmp_path / f"{number}.jsonl", [{"question": "?", "answer": "1", "tag": value}])
        with pytest.raises(UserError, match=r"jsonl:1 .*column 'tag' cannot be given to a reward function as JSON"):
            opened(source, extra=("tag",))
        assert len(opened(source)) == 1


def test_a_resume_with_other_further_columns_is_one_with_other_problems(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [{"question": "?", "answer": "1", "level": 3}])
    before, after = opened(source), opened(source, extra=("level",))
    assert before.fingerprint != after.fingerprint


def test_a_directory_of_a_hub_dataset_is_read_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split, answer in (("train", "1"), ("test", "2")):
        pq.write_table(pa.table({"question": ["?"], "answer": [answer]}), tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    assert [p.answer for p in opened(str(tmp_path / "set"))] == ["1"]
    assert [p.answer for p in opened(str(tmp_path / "set"), train_split="test")] == ["2"]


def test_a_hub_dataset_may_name_a_split_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd@name").mkdir()
    unknown = f"{300 * 'x'}@y"  # too long to be the name of a directory
    sets = {"a": "owner/a:main@dev", "b": "owner/b", "c": "c@1.jsonl", "d": "odd@name", "e": "odd@name@dev", "f": unknown}
    found = sources_of(DataConfig(train="owner/t@all", eval=sets))
    assert [(one.location, one.hub_split) for one in found] == [
        ("owner/t", "all"),
        ("owner/a:main", "dev"),
        ("owner/b", "test"),
        ("c@1.jsonl", "test"),
        ("odd@name", "test"),
        ("odd@name", "dev"),
        (300 * "x", "y"),
    ]


def test_sets_are_named_by_their_key():
    config = DataConfig(train="t.jsonl", eval={"aime24": "a.jsonl", "amc23": "owner/b"}, eval_split="te")
    assert sources_of(config) == [
        Source("data.train", "t.jsonl", "train", "train"),
        Source("data.eval.aime24", "a.jsonl", "te", "eval", "aime24"),
        Source("data.eval.amc23", "owner/b", "te", "eval", "amc23"),
    ]
    assert sources_of(DataConfig(eval="e.jsonl"))[1:] == [Source("data.eval", "e.jsonl", "test", "eval")]
    assert len(sources_of(DataConfig(eval=None))) == 1
    several = DataConfig(train={"gsm8k": "owner/g", "maths": "m.parquet"}, train_split="all", eval=None)
    assert sources_of(several) == [
        Source("data.train.gsm8k", "owner/g", "all", "train", "gsm8k"),
        Source("data.train.maths", "m.parquet", "all", "train", "maths"),
    ]


THINKING = byte_tokenizer(
    CHAT_TEMPLATE + "{% if enable_thinking is false %}<none>{% endif %}{{ '!' * effort if effort else '' }}"
)


def test_arguments_of_the_chat_template_reach_it(tmp_path):
    source = write_jsonl(tmp_path / "k.jsonl", [{"question": "1+1?", "answer": "2"}])
    for given, wanted in (({}, ""), ({"enable_thinking": True}, ""), ({"enable_thinking": False, "effort": 3}, "<none>!!!")):
        for held_out in (False, True):
            (problem,) = opened(source, THINKING, held_out=held_out, chat_template_kwargs=given)
            assert THINKING.decode(problem.prompt_ids) == "<user>1+1?<assistant>" + wanted


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("enable_thinkin", "is not an argument of the tokenizer's chat template"),
        ("thinking", "is not an argument of the tokenizer's chat template"),
        ("add_generation_prompt", "is set by the job"),
        ("tokenize", "is set by the job"),
        ("messages", "is set by the job"),
    ],
)
def test_an_argument_that_is_not_the_chat_templates_is_refused(tmp_path, name, why):
    source = write_jsonl(tmp_path / "k.jsonl", [{"question": "1+1?", "answer": "2"}])
    with pytest.raises(UserError, match=f"^data.chat_template_kwargs: '{name}' {why}; remove it"):
        opened(source, THINKING, chat_template_kwargs={name: True})
    with pytest.raises(UserError, match=r"^data\.chat_template_kwargs is set but no chat template applies \("):
        opened(source, PLAIN, chat_template_kwargs={"enable_thinking": True})


def test_what_is_asked_of_a_models_tokenizer_is_checked_before_a_job_starts(tmp_path):
    THINKING.save_pretrained(tmp_path)
    asked = ["data.chat_template_kwargs={enable_thinking: false}", "rollout.stop_tokens=['A']", f"model.path={tmp_path}"]
    check_tokenizer(load_config(None, asked))
    check_tokenizer(load_config(None, [*asked[:2], "model.path=tiny"]))
    with pytest.raises(UserError) as caught:
        check_tokenizer(load_config(None, [asked[2], "data.chat_template_kwargs={thinking: 1}", "rollout.stop_tokens=['AB']"]))
    assert str(caught.value).splitlines() == [
        "rollout.stop_tokens: 'AB' is not a token of the model's tokenizer; name single tokens by their text",
        "data.chat_template_kwargs: 'thinking' is not an argument of the tokenizer's chat template; remove it",
    ]
