from __future__ import annotations

import json
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from etr_megatron.config import sources_of
from etr_megatron.config.schema import ArithmeticConfig, DataConfig
from etr_megatron.data import ProblemSet, load_tokenizer, open_problems, set_of
from etr_megatron.errors import UserError

ARITHMETIC = ArithmeticConfig(train_problems=50, eval_problems=20)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, so that lengths are known without the code under test."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=chat_template)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def write_jsonl(path: Path, lines: list[object]) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def opened_all(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> list[ProblemSet]:
    return [open_problems(source, config, ARITHMETIC, tokenizer) for source in sources_of(config)]


def opened(source: str, tokenizer: PreTrainedTokenizerFast, **settings: object) -> ProblemSet:
    (found,) = opened_all(replace(DataConfig(train=source, eval=None), **settings), tokenizer)
    return found


GOOD = {"question": "1+1?", "answer": "2"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL"])
def test_jsonl_rows_keep_order_ids_and_answers(tmp_path, tokenizer, name):
    source = write_jsonl(tmp_path / name, [GOOD, "", {"question": " Größe? \\frac{1}{2}\n", "answer": 7, "x": [1]}])
    problems = opened(source, tokenizer)
    assert [(p.id, p.prompt, p.answer) for p in problems] == [
        (f"{name}:1", "1+1?", "2"),
        (f"{name}:3", " Größe? \\frac{1}{2}\n", "7"),
    ]
    assert [tokenizer.decode(p.prompt_ids) for p in problems] == [p.prompt for p in problems]
    assert (problems.skipped_broken, problems.skipped_too_long) == (0, 0)


BROKEN_LINES = [
    ('{"question": "1+1?", "answer": ', "not JSON at character 32 ("),
    ('{"question": "1+1?", "answer": }', "not JSON at character 32 ("),
    ('["a list"]', "a JSON list, not an object"),
    ('{"question": null, "answer": "2"}', "column 'question' is null"),
    ('{"answer": "2"}', "column 'question' is missing"),
    ('{"question": 5, "answer": "2"}', "column 'question' is int, not text or chat messages"),
    ('{"question": {"role": ["user"]}, "answer": "2"}', "column 'question' is dict, not text or chat messages"),
    ('{"question": "  ", "answer": "2"}', "column 'question' is empty"),
    ('{"question": "1+1?"}', "column 'answer' is missing"),
    ('{"question": "1+1?", "answer": ["2"]}', "column 'answer' is list, not text or a number"),
    ('{"question": "1+1?", "answer": true}', "column 'answer' is bool, not text or a number"),
    ('{"question": "1+1?", "answer": NaN}', "is nan, not a finite number"),
    ('{"question": "1+1?", "answer": -Infinity}', "is -inf, not a finite number"),
    ('{"question": "1+1?", "answer": ' + 5000 * "9" + "}", "not readable JSON (Exceeds the limit"),
    ('{"question": "1+1?", "answer": ""}', "column 'answer' is empty"),
    ('{"question": "1+\\ud83d?", "answer": "2"}', "column 'question' has half a surrogate pair at character 3"),
    ("[" * 100_000, "not readable JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES)
def test_a_broken_line_is_fatal_with_its_file_and_line_or_skipped_and_counted(tmp_path, tokenizer, line, reason):
    source = write_jsonl(tmp_path / "b.jsonl", [GOOD, GOOD, line, GOOD])
    with pytest.raises(UserError, match=r"b\.jsonl:3 .*on_bad_row=skip") as caught:
        opened(source, tokenizer)
    assert reason in str(caught.value)
    problems = opened(source, tokenizer, on_bad_row="skip")
    assert [p.id for p in problems] == ["b.jsonl:1", "b.jsonl:2", "b.jsonl:4"]
    assert problems.skipped_broken == 1


def test_an_answer_that_is_too_large_for_a_float_is_kept(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "h.jsonl", [GOOD | {"answer": 10**400}])
    assert opened(source, tokenizer)[0].answer == f"1{400 * '0'}"


def test_joined_sets_keep_their_problems_apart_by_name(tmp_path, tokenizer):
    """A file given twice comes twice, and problems under other names are others."""
    source = write_jsonl(tmp_path / "a.jsonl", [GOOD, "broken", "broken", {"question": 40 * "long", "answer": "7"}, GOOD])
    config = DataConfig(train={"x": source, "y": source}, eval=None, on_bad_row="skip", max_prompt_tokens=100)
    first, second = opened_all(config, tokenizer)
    both = ProblemSet.joined([("x", first), ("y", second)])
    assert [one.id for one in both] == ["x/a.jsonl:1", "x/a.jsonl:5", "y/a.jsonl:1", "y/a.jsonl:5"]
    assert [set_of(one.id) for one in both] == ["x", "x", "y", "y"]
    assert (both.skipped_broken, both.skipped_too_long) == (4, 2)
    assert both.fingerprint != ProblemSet.joined([("x", first), ("z", second)]).fingerprint
    alone = ProblemSet.joined([("", first)])
    assert alone.problems == first.problems and alone.fingerprint == first.fingerprint


def test_a_line_that_is_not_utf8_is_reported_by_line(tmp_path, tokenizer):
    (tmp_path / "u.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "\xff", "answer": "2"}\n')
    with pytest.raises(UserError, match=r"u\.jsonl:2 .*not UTF-8 at byte 15"):
        opened(str(tmp_path / "u.jsonl"), tokenizer)


def test_a_byte_order_mark_is_no_broken_line(tmp_path, tokenizer):
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(opened(str(tmp_path / "bom.jsonl"), tokenizer)) == 1


def test_a_missing_column_is_reported_with_the_available_ones(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "c.jsonl", [{"problem": "1+1?", "answer": "2"}])
    with pytest.raises(UserError, match=r"no column 'question' \(data\.prompt_column\); its columns are 'problem', 'answer'"):
        opened(source, tokenizer, on_bad_row="skip")
    assert opened(source, tokenizer, prompt_column="problem")[0].prompt == "1+1?"
    with pytest.raises(UserError, match=r"no column 'uid' \(data\.id_column\)"):
        opened(source, tokenizer, prompt_column="problem", id_column="uid")
    many = write_jsonl(tmp_path / "m.jsonl", [{f"c{number}": 1 for number in range(27)}])
    with pytest.raises(UserError, match=r"'c22', 'c23', and 3 more$"):
        opened(many, tokenizer)
    with pytest.raises(UserError, match=r"no column 'answer' \(data\.answer_column\); it has none at all$"):
        opened(write_jsonl(tmp_path / "n.jsonl", [{}]), tokenizer)


def test_a_column_that_the_first_row_lacks_is_that_rows_mistake(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "f.jsonl", [{"question": "1+1?"}, GOOD])
    with pytest.raises(UserError, match=r"f\.jsonl:1 .*column 'answer' is missing"):
        opened(source, tokenizer)
    assert [p.id for p in opened(source, tokenizer, on_bad_row="skip")] == ["f.jsonl:2"]


def test_ids_of_the_id_column_must_be_unique(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "i.jsonl", [GOOD | {"uid": 4}, GOOD | {"uid": "5"}, GOOD | {"uid": 4}])
    with pytest.raises(UserError, match=r"i\.jsonl:3 .*id '4' is already that of i\.jsonl:1"):
        opened(source, tokenizer, id_column="uid")
    assert [p.id for p in opened(source, tokenizer, id_column="uid", on_bad_row="skip")] == ["4", "5"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, tokenizer, content):
    (tmp_path / "e.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"data\.train: .*e\.jsonl' has no rows"):
        opened(str(tmp_path / "e.jsonl"), tokenizer)


def test_a_file_with_only_broken_rows_is_refused(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "n.jsonl", ["{", "{"])
    with pytest.raises(UserError, match=r"none of the 2 rows"):
        opened(source, tokenizer, on_bad_row="skip")


def test_long_prompts_are_skipped_and_counted_and_a_limit_that_leaves_none_is_refused(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "l.jsonl", [GOOD | {"question": "x" * length} for length in (9, 10, 11, 30)])
    problems = opened(source, tokenizer, max_prompt_tokens=10)
    assert [len(p.prompt_ids) for p in problems] == [9, 10]
    assert problems.skipped_too_long == 2
    with pytest.raises(UserError, match=r"all 4 prompts .* data\.max_prompt_tokens=8"):
        opened(source, tokenizer, max_prompt_tokens=8)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "folder.jsonl"])
def test_a_missing_file_is_refused_by_name(tmp_path, tokenizer, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=rf"data\.eval: there is no file .*{name}"):
        opened_all(DataConfig(eval=str(tmp_path / name)), tokenizer)
    with pytest.raises(UserError, match=rf"data\.train: there is no file .*{name}"):
        opened(str(tmp_path / name), tokenizer)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that cannot be read, even by root")
def test_a_file_that_cannot_be_read_is_refused(tmp_path, tokenizer):
    (tmp_path / "u.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"data\.train: .*u\.jsonl' cannot be read \(Input/output error\)"):
        opened(str(tmp_path / "u.jsonl"), tokenizer)


def test_other_file_types_are_not_taken_for_hub_names(tmp_path, tokenizer):
    plain = (tmp_path / "problems", tmp_path / "pro@blems")
    for file in plain:
        file.write_text("")
    endings = (".csv", ".tsv", ".json", ".txt", ".arrow", ".gz", ".zst", ".zip", ".CSV")
    for source in [*map(str, plain), *(str(tmp_path / f"a{ending}") for ending in endings)]:
        with pytest.raises(UserError, match=r"neither \.jsonl nor \.parquet"):
            opened(source, tokenizer)


def write_parquet(path: Path, **columns: list[object]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_parquet_is_read_without_a_copy_in_the_cache(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = write_parquet(tmp_path / "p.parquet", question=["1+1?", "2+2?"], answer=[Decimal("2.00"), Decimal("4.50")])
    assert [(p.id, p.prompt, p.answer) for p in opened(source, tokenizer)] == [
        ("p.parquet:1", "1+1?", "2.00"),
        ("p.parquet:2", "2+2?", "4.50"),
    ]
    assert not list(tmp_path.glob("cache/**/*.arrow"))


def test_bad_parquet_is_refused(tmp_path, tokenizer):
    source = write_parquet(tmp_path / "q.parquet", question=["1+1?", None], answer=["2", "4"])
    with pytest.raises(UserError, match=r"q\.parquet:2 .*column 'question' is null"):
        opened(source, tokenizer)
    with pytest.raises(UserError, match=r"no column 'prompt' .*'question', 'answer'"):
        opened(source, tokenizer, prompt_column="prompt")
    (tmp_path / "r.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"r\.parquet' cannot be read as parquet"):
        opened(str(tmp_path / "r.parquet"), tokenizer)
    empty = write_parquet(tmp_path / "s.parquet", question=pa.array([], pa.string()), answer=pa.array([], pa.string()))
    with pytest.raises(UserError, match=r"has no rows"):
        opened(empty, tokenizer)


def test_all_columns_that_no_row_has_are_told_at_once(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "c.jsonl", [GOOD])
    with pytest.raises(UserError) as caught:
        opened(source, tokenizer, prompt_column="problem", answer_column="solution")
    told = "has no column 'problem' (data.prompt_column) and no column 'solution' (data.answer_column); its columns are "
    assert told in str(caught.value)


def test_a_hub_dataset_is_loaded_by_name_config_and_split(tokenizer, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"question": ["1+1?"], "answer": ["2"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    config = DataConfig(train="owner/set:main", eval="owner/set", train_split="tr", eval_split="te")
    train, held_out = opened_all(config, tokenizer)
    assert [p.id for p in [*train, *held_out]] == ["owner/set:main:tr:1", "owner/set:te:1"]
    assert asked == [("owner/set", "main", "tr"), ("owner/set", None, "te")]


def test_a_hub_dataset_that_cannot_be_reached_is_refused_in_one_sentence(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"data\.train: dataset 'owner/no-such-set' \(split 'train'\) could not be loaded"
    ) as caught:
        opened("owner/no-such-set", tokenizer)
    assert "\n" not in str(caught.value) and "is not in the cache, and" not in str(caught.value)  # offline, as requested


def test_rows_that_cannot_be_read_to_their_end_are_refused_with_the_readers_reason(tokenizer, monkeypatch):
    def load_dataset(*_, **__):
        yield GOOD
        raise OSError("corrupt page")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data\.train: 'owner/set' cannot be read \(corrupt page\)"):
        opened("owner/set", tokenizer)


def test_arithmetic_problems_have_the_right_answer_and_disjoint_splits(tokenizer):
    train, held_out = opened_all(DataConfig(), tokenizer)
    assert (len(train), len(held_out)) == (50, 20)
    for problem in [*train, *held_out]:
        expression = problem.prompt.removeprefix("What is ").removesuffix("?")
        assert problem.id == f"arithmetic:{expression}"
        assert eval(expression) == int(problem.answer)
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}


def test_chat_template_holds_system_prompt_and_wrapped_prompt_and_opens_the_answer(tmp_path):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    source = write_jsonl(tmp_path / "t.jsonl", [GOOD])
    wrapped = opened(source, tokenizer, system_prompt="Be brief.", prompt_template="{prompt} Use \\boxed{}.")[0]
    assert wrapped.prompt == "1+1? Use \\boxed{}."
    assert tokenizer.decode(wrapped.prompt_ids) == "<system>Be brief.<user>1+1? Use \\boxed{}.<assistant>"
    plain = opened(source, tokenizer, chat_template=False)[0]
    assert tokenizer.decode(plain.prompt_ids) == "1+1?"
    # No system prompt and an empty one differ: without one, some templates insert their own.
    empty = opened(source, tokenizer, system_prompt="", prompt_template="{prompt} {prompt}")[0]
    assert tokenizer.decode(empty.prompt_ids) == "<system><user>1+1? 1+1?<assistant>"


def test_special_tokens_are_the_templates_where_there_is_one_else_the_tokenizers(tmp_path):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    first = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = first
    source = write_jsonl(tmp_path / "t.jsonl", [GOOD])
    for chat_template, wanted in ((True, "<user>1+1?<assistant>"), (False, "<eos>1+1?")):
        assert tokenizer.decode(opened(source, tokenizer, chat_template=chat_template)[0].prompt_ids) == wanted


def test_settings_that_cannot_be_applied_are_refused(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "s.jsonl", [GOOD])
    for system_prompt in ("Be brief.", ""):
        with pytest.raises(UserError, match=r"data\.system_prompt is set but no chat template"):
            opened(source, tokenizer, system_prompt=system_prompt)
    with pytest.raises(UserError, match=r"data\.prompt_template 'no place' lacks \{prompt\}"):
        opened(source, tokenizer, prompt_template="no place")
    refusing = byte_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x")
    with pytest.raises(UserError, match=r"chat template refuses the prompts \(no system role\)"):
        opened(source, refusing, system_prompt="Be brief.")


def raise_two_lines(*_, **__):
    raise OSError("first\nsecond")


def test_load_tokenizer_refuses_what_holds_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"model\.path: there is no directory"):
        load_tokenizer(tmp_path / "gone")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match=r"model\.path: there is no directory"):
        load_tokenizer(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"holds no tokenizer"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raise_two_lines)
    for name in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "tekken.json", "spiece.model"):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=r"^model\.path: the tokenizer in .* cannot be loaded \(OSError: first\); "):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    monkeypatch.undo()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_refuses_one_that_encodes_to_nothing(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "<eos>": 1}, unk_token=None))
    tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match=r"encodes text to no tokens"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_round_trips_text(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Größe: 12 + 7")) == "Größe: 12 + 7"


def test_a_directory_with_a_broken_file_is_told_with_what_is_wrong_in_it(tmp_path, tokenizer):
    (tmp_path / "broken.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "1+1?" "answer": "2"}\n')
    with pytest.raises(UserError, match=r"data\.train: dataset '.*' \(split 'train'\) could not be loaded \(.*JSON") as told:
        opened(str(tmp_path), tokenizer)
    assert "error occurred while generating" not in str(told.value)
