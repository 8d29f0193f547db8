"""Tokens of an environment's replies: those that the chat template has between two turns of the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from etr_megatron.config import DataConfig, load_config
from etr_megatron.data import ReplyTokenizer, check_tokenizer
from etr_megatron.data.prompts import tokenize_prompts
from etr_megatron.errors import UserError
from tests.test_data_sources import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHTS_DROPPED = (  # as Qwen3's: thoughts before the last user message are left out; tools answer in the user's place
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n</tool_response><|im_end|>\n"
    "{% elif m['role'] == 'assistant' and loop.index0 < ns.last %}"
    "<|im_start|>assistant\n{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_END = (  # as GLM-4.5's: the next role's token ends a turn
    "{% for m in messages %}<|{{ 'observation' if m['role'] == 'tool' else m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
ONLY_THE_LAST = "{{ messages[-1]['content'] }}<|im_start|>"

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eom|>", "<|user|>", "<|assistant|>", "<|observation|>"]
USER = [{"role": "user", "content": "6 times 7?"}]


def tokenizer_of(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL], special_tokens=True)
    return tokenizer


def ids_of(tokenizer, *names: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


def dialogue(tokenizer, turns: list[str], replies: list[list[dict]], ends: list[str], config: DataConfig) -> list[int]:
    """The tokens of a whole dialogue as it grows: what was drawn, and what is put in between."""
    stops = ids_of(tokenizer, *SPECIAL[1:])
    tokenize = ReplyTokenizer(config, tokenizer, stops)
    (ids,) = tokenize_prompts([USER], config, tokenizer)
    for turn, end, reply in zip(turns, ends, [*replies, None], strict=True):
        ids = ids + tokenizer.encode(turn, add_special_tokens=False) + (ids_of(tokenizer, end) if end else [])
        if reply is not None:
            ids = ids + tokenize(reply, ids[-1])
    return ids


def messages_of(turns: list[str], replies: list[list[dict]]) -> list[dict]:
    found = [*USER]
    for turn, reply in zip(turns, [*replies, []], strict=True):
        found += [{"role": "assistant", "content": turn}, *reply]
    return found


@pytest.mark.parametrize(
    ("template", "end", "role"),
    [
        (CHATML, "<|im_end|>", "user"),
        (CHATML, "<|im_end|>", "tool"),
        (NO_END, "<|user|>", "user"),
        (ALTERNATING, "<|im_end|>", "user"),
    ],
)
def test_a_dialogue_has_the_tokens_that_the_template_gives_all_its_messages(template, end, role):
    tokenizer, config = tokenizer_of(template), DataConfig()
    turns, replies = ["41", "no: 43", "42"], [[{"role": role, "content": "Less."}], [{"role": role, "content": "Nö <b>"}]]
    found = dialogue(tokenizer, turns, replies, [end, end, ""], config)
    whole = tokenizer.apply_chat_template(messages_of(turns, replies), tokenize=False)
    wanted = tokenizer.encode(whole, add_special_tokens=False)
    assert found == wanted[: len(found)] and len(wanted) - len(found) <= 2  # the last turn goes on


def test_a_turn_that_ends_with_another_stop_token_keeps_it_in_place_of_the_templates():
    tokenizer, config = tokenizer_of(CHATML), DataConfig()
    tokenize = ReplyTokenizer(config, tokenizer, ids_of(tokenizer, "<|im_end|>", "<|eom|>"))
    reply = [{"role": "tool", "content": "42"}]
    (eom, end), (x,) = ids_of(tokenizer, "<|eom|>", "<|im_end|>"), tokenizer.encode("x", add_special_tokens=False)
    after = "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenize(reply, eom)) == tokenizer.decode(tokenize(reply, end)) == after
    assert tokenizer.decode(tokenize(reply, x)) == "<|im_end|>" + after  # a turn that a text ended is closed


def test_observation_tokens_end_a_turn_and_begin_the_reply():
    tokenizer = tokenizer_of(NO_END)
    tokenize = ReplyTokenizer(DataConfig(), tokenizer, ids_of(tokenizer, "<|user|>", "<|observation|>"))
    (observation,) = ids_of(tokenizer, "<|observation|>")
    assert tokenizer.decode(tokenize([{"role": "tool", "content": "42"}], observation)) == "\n42<|assistant|>\n"


@pytest.mark.parametrize(("before", "is_left_out"), [(" ", True), ("\n", True), (" ok", False)])
def test_blanks_before_the_templates_end_of_a_turn_are_left_out_with_it(before, is_left_out):
    """Llama 2's template has a blank there, with which the turn would end twice."""
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", f"{before}<|im_end|>"))
    stops = ids_of(tokenizer, *SPECIAL[1:])
    ids = ReplyTokenizer(DataConfig(), tokenizer, stops)([{"role": "user", "content": "7"}], stops[0])
    rest = f"\n<|im_start|>user\n7{before}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == (rest if is_left_out else f"{before}<|im_end|>{rest}")


def test_thoughts_of_earlier_turns_stay_though_the_template_would_drop_them():
    tokenizer, config = tokenizer_of(THOUGHTS_DROPPED), DataConfig(chat_template_kwargs={"thinking": True})
    turns, replies = ["<think>\nHm.\n</think>\n\n41", "42"], [[{"role": "user", "content": "Less."}]]
    found = tokenizer.decode(dialogue(tokenizer, turns, replies, ["<|im_end|>", ""], config))
    assert found == (
        "<|im_start|>user\n6 times 7?<|im_end|>\n<|im_start|>assistant\n<think>\nHm.\n</think>\n\n41<|im_end|>\n"
        "<|im_start|>user\nLess.<|im_end|>\n<|im_start|>assistant\n42"
    )
    without = replace(config, chat_template_kwargs={})
    found = tokenizer.decode(dialogue(tokenizer, ["41", "42"], replies, ["<|im_end|>", ""], without))
    assert found.endswith("Less.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n42")


def test_several_messages_of_a_reply_come_in_their_order():
    tokenizer = tokenizer_of(THOUGHTS_DROPPED)
    tokenize = ReplyTokenizer(DataConfig(), tokenizer, ids_of(tokenizer, "<|im_end|>"))
    reply = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, {"role": "user", "content": "Go on."}]
    assert tokenizer.decode(tokenize(reply, *ids_of(tokenizer, "<|im_end|>"))) == (
        "\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>user\n<tool_response>\n2\n</tool_response>"
        "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(("template", "config"), [(None, DataConfig()), (CHATML, DataConfig(chat_template=False))])
def test_without_a_chat_template_a_reply_is_its_text(template, config):
    tokenizer = tokenizer_of(template)
    tokenize = ReplyTokenizer(config, tokenizer, ids_of(tokenizer, "<|im_end|>"))
    reply = [{"role": "tool", "content": "<result>4"}, {"role": "tool", "content": "2</result>"}]
    assert tokenizer.decode(tokenize(reply, *ids_of(tokenizer, "<|im_end|>"))) == "<result>42</result>"


def test_special_tokens_in_the_text_of_a_reply_are_those_tokens():
    tokenizer = tokenizer_of(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    reply = ReplyTokenizer(DataConfig(), tokenizer, [end])([{"role": "tool", "content": "a <|im_end|> b"}], end)
    assert reply.count(end) == 2  # the text's and the template's


def test_a_long_reply_is_no_reason_for_a_warning_of_the_tokenizer(caplog, capfd):
    tokenizer = tokenizer_of(None)
    tokenizer.model_max_length = 8
    assert len(ReplyTokenizer(DataConfig(), tokenizer, [])([{"role": "user", "content": "long " * 9}], 0)) > 8
    assert "indexing errors" not in caplog.text + "".join(capfd.readouterr())


def test_tool_schemas_reach_the_template(tmp_path):
    tokenizer, file = tokenizer_of(THOUGHTS_DROPPED), tmp_path / "tools.json"
    file.write_text(json.dumps([{"type": "function", "function": {"name": "add"}}]))
    (ids,) = tokenize_prompts([USER], DataConfig(tools=str(file)), tokenizer)
    assert tokenizer.decode(ids).startswith(
        '<|im_start|>system\n[{"type": "function", "function": {"name": "add"}}]<|im_end|>\n'
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not readable as JSON (Expecting"),
        ("{}", "must hold a JSON list"),
        ("[]", "must hold a JSON list"),
        ("[1]", "each an object"),
    ],
)
def test_a_file_without_tool_schemas_is_refused(tmp_path, text, why):
    file = tmp_path / "tools.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"^data\.tools: ") as caught:
        tokenize_prompts([USER], DataConfig(tools=str(file)), tokenizer_of(THOUGHTS_DROPPED))
    assert why in str(caught.value)


def test_tools_that_no_template_describes_are_refused(tmp_path):
    file = tmp_path / "tools.json"
    file.write_text('[{"type": "function"}]')
    with pytest.raises(
        UserError, match=r"^data\.tools is set, but the tokenizer's chat template describes no tools: remove it"
    ):
        tokenize_prompts([USER], DataConfig(tools=str(file)), tokenizer_of(CHATML))
    with pytest.raises(UserError, match=r"^data\.tools is set but no chat template applies \("):
        tokenize_prompts([USER], DataConfig(tools=str(file)), tokenizer_of(None))
    with pytest.raises(UserError, match=r"^data\.chat_template_kwargs: 'tools' is set by the job; give them in data.tools"):
        tokenize_prompts([USER], DataConfig(chat_template_kwargs={"tools": "a"}), tokenizer_of(THOUGHTS_DROPPED))


def test_a_role_that_the_template_refuses_is_refused_before_the_start(tmp_path):
    tokenizer_of(ALTERNATING).save_pretrained(tmp_path)
    asked = [f"model.path={tmp_path}", "environment.function=some.module:reply"]
    check_tokenizer(load_config(None, asked))
    with pytest.raises(
        UserError, match=r"refuses a reply of role tool \(roles must alternate\): change environment.role, or what"
    ):
        check_tokenizer(load_config(None, [*asked, "environment.role=tool"]))


def test_a_template_that_leaves_out_the_models_turn_is_refused():
    tokenize = ReplyTokenizer(DataConfig(), tokenizer_of(ONLY_THE_LAST), ())
    with pytest.raises(
        UserError, match=r"leaves out a turn of the model before a reply of role user: change environment\.role"
    ):
        tokenize([{"role": "user", "content": "Less."}], 0)


def test_a_missing_file_of_tool_schemas_is_told_before_the_start_also_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"^data\.tools: .*none\.json is not readable as JSON"):
        check_tokenizer(load_config(None, [f"data.tools={tmp_path / 'none.json'}"]))
