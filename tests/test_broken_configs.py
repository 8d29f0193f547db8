"""A broken config.json gives a one-sentence error with the file, the field and what was expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from etr_megatron.errors import UserError
from etr_megatron.weights import open_checkpoint, read_architecture
from tests.hf_models import rewrite_config_as_published

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def config_with(model: str, folder: Path, change: dict[str, Any], *, without: str = "") -> Path:
    """A directory with the model's config.json in its published form, with some values changed."""
    shutil.copyfile(f"{model}/config.json", folder / "config.json")
    rewrite_config_as_published(folder)
    config = json.loads((folder / "config.json").read_text()) | change
    config.pop(without, None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(read: Any, folder: Path) -> str:
    """The error message, without the file name at its start."""
    with pytest.raises(UserError) as caught:
        read(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder / 'config.json'}: ") and "\n" not in said
    return said.removeprefix(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("num_hidden_layers", "4", 'num_hidden_layers must be a positive integer, not "4"'),
        ("hidden_size", None, "hidden_size must be a positive integer, not null"),
        ("num_attention_heads", 0, "num_attention_heads must be a positive integer, not 0"),
        ("num_key_value_heads", 0, "num_key_value_heads must be a positive integer, not 0"),
        ("head_dim", -1, "head_dim must be a positive integer, not -1"),
        ("intermediate_size", 80.5, "intermediate_size must be a positive integer, not 80.5"),
        ("vocab_size", True, "vocab_size must be a positive integer, not true"),
        ("max_position_embeddings", [1], "max_position_embeddings must be a positive integer, not [1]"),
        ("rms_norm_eps", "1e-6", 'rms_norm_eps must be a positive number, not "1e-6"'),
        ("rope_theta", 0, "rope_theta must be a positive number, not 0"),
        ("rope_scaling", "x", 'rope_scaling must be an object, not "x"'),
        ("rope_parameters", [], "rope_parameters must be an object, not []"),
        ("tie_word_embeddings", "false", 'tie_word_embeddings must be true or false, not "false"'),
        ("norm_topk_prob", 1, "norm_topk_prob must be true or false, not 1"),
        ("decoder_sparse_step", 0, "decoder_sparse_step must be a positive integer, not 0"),
        ("mlp_only_layers", 1, "mlp_only_layers must be a list of layer numbers, not 1"),
        ("mlp_only_layers", ["1"], 'mlp_only_layers must be a list of layer numbers, not ["1"]'),
        ("num_experts", 0, "num_experts must be a positive integer, not 0"),
        ("num_experts_per_tok", None, "num_experts_per_tok must be a positive integer, not null"),
        ("moe_intermediate_size", {}, "moe_intermediate_size must be a positive integer, not {}"),
        ("num_experts_per_tok", 7, "num_experts_per_tok is 7, more than the 6 experts"),
        ("num_experts_per_tok", 1, "num_experts_per_tok is 1 with norm_topk_prob, which leaves the router without a gradient"),
        ("num_key_value_heads", 3, "num_attention_heads is 4, which is not a multiple of num_key_value_heads 3"),
        ("architectures", 3, "architectures is 3; supported are "),
        ("architectures", [["Qwen3ForCausalLM"]], "architectures is [['Qwen3ForCausalLM']]; supported are "),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(hf_models, tmp_path, name, value, sentence):
    folder = config_with(hf_models["qwen3_moe"], tmp_path, {name: value})
    assert refusal(read_architecture, folder).startswith(sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        # transformers takes the class from model_type, a server from `architectures`
        ({"model_type": "llama"}, 'model_type is "llama"; only "qwen3" is supported for the qwen3 family'),
        # transformers then attends to later tokens, servers do not
        ({"is_causal": False}, "is_causal is false; only true is supported for the qwen3 family"),
        ({"use_sliding_window": True}, "use_sliding_window is true; only false is supported for the qwen3 family"),
        ({"attention_bias": True}, "attention_bias is true; only false is supported for the qwen3 family"),
        ({"mlp_bias": True}, "mlp_bias is true; only false is supported for the qwen3 family"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            'layer_types is ["full_attention", "sliding_attention"]; only',
        ),
        ({"layer_types": "x"}, 'layer_types is "x"; only a list of full_attention is supported'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 is supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; only 1 is supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported; supported are default,"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type 3 is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type ['yarn'] is not supported"),
        # transformers reads only attention_factor, SGLang only attn_factor
        (
            {"rope_scaling": {**YARN, "attention_factor": 1.2}},
            "attention_factor is 1.2 for rope_type yarn; yarn is supported only without it",
        ),
        (
            {"rope_scaling": {**YARN, "attn_factor": 1.2}},
            "attn_factor is 1.2 for rope_type yarn; yarn is supported only without it",
        ),
        (
            {"rope_scaling": {**YARN, "truncate": False}},
            "truncate is false for rope_type yarn; yarn is supported only without it",
        ),
        ({"rope_scaling": {**YARN, "factor": None}}, "field 'factor' is missing"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast must be a positive number, not -1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "field 'original_max_position_embeddings' is missing"),
        (
            {"rope_scaling": {**LLAMA3, "type": "default"}},
            "rope_scaling has the type 'default' and the rope_type 'llama3'; remove the wrong one",
        ),
        (
            {"rope_parameters": {"full_attention": LLAMA3, "rope_theta": 1e4}},
            "rope_parameters has several rotary embeddings (full_attention, rope_theta); only one is supported",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters disagree; remove the wrong one",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 777}, "rope_theta": 1e6},
            "rope_theta is 777 in rope_parameters, 1e+06 in config.json itself; remove the wrong one",
        ),
        # transformers ignores rope_parameters if there is a rope_scaling
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 777}, "rope_theta": None},
            "rope_theta is 10000 in rope_scaling, 777 in rope_parameters; remove the wrong one",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
            "original_max_position_embeddings is 64, but 32 for the rotary embedding; remove the wrong one",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, 'factor must be a positive number, not "8"'),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "field 'low_freq_factor' is missing"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
            "field 'original_max_position_embeddings' is missing",
        ),
        # if missing, transformers uses max_position_embeddings in spite of the outer one
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}, "original_max_position_embeddings": 32},
            "field 'original_max_position_embeddings' is missing",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_others_would_read_as_another_model_is_refused(hf_models, tmp_path, change, sentence):
    """None of these changes is visible in a tensor's name or shape."""
    folder = config_with(hf_models["qwen3"], tmp_path, change)
    assert refusal(read_architecture, folder).startswith(sentence)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 777.0},
        {"rope_theta": 777},
        {"rope_parameters": {"rope_theta": 777.0}, "rope_theta": None},
        {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}, "rope_theta": 777.0},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_scaling": {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}},
        {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 777.0}, "rope_theta": 777.0},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": True, "attention_factor": None}},
        {"partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 4, "is_causal": True, "use_sliding_window": False},
        {"layer_types": None},
    ],
    ids=lambda change: "-".join(change),
)
@pytest.mark.parametrize("theta", [{}, {"rope_theta": 500000.0}], ids=["", "theta"])
def test_a_rotary_embedding_is_what_transformers_reads_however_it_is_written(hf_models, tmp_path, change, theta):
    folder = config_with(hf_models["qwen3"], tmp_path, theta | change)
    theirs = {key: value for key, value in AutoConfig.from_pretrained(folder).rope_parameters.items() if value is not None}
    ours = read_architecture(folder).rope
    assert ours == {key: theirs[key] for key in ours} and set(theirs) - set(ours) <= {
        "type",
        "partial_rotary_factor",
        "truncate",
    }


@pytest.mark.parametrize(("window", "without"), [(32, ""), (None, "sliding_window")])
def test_a_window_of_attention_is_refused_also_where_transformers_takes_its_own(hf_models, tmp_path, window, without):
    folder = config_with(hf_models["mistral"], tmp_path, {"sliding_window": window}, without=without)
    taken = AutoConfig.from_pretrained(folder).sliding_window
    message = f"sliding_window is {taken}; only null is supported for the mistral family"
    assert taken is not None and refusal(read_architecture, folder) == message


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "rms_norm_eps", "num_experts_per_tok"])
def test_a_missing_field_is_named(hf_models, tmp_path, name):
    folder = config_with(hf_models["qwen3_moe"], tmp_path, {}, without=name)
    assert refusal(read_architecture, folder) == f"field '{name}' is missing"


@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "mlp_only_layers"])
def test_null_is_as_good_as_absent_where_a_field_may_be_absent(hf_models, tmp_path, name):
    null = read_architecture(config_with(hf_models["qwen3_moe"], tmp_path, {name: None}))
    assert null == read_architecture(config_with(hf_models["qwen3_moe"], tmp_path, {}, without=name))
    assert (null.kv_heads, null.head_dim) == {"num_key_value_heads": (4, 16), "head_dim": (2, 12)}.get(name, (2, 16))


@pytest.mark.parametrize("read", [read_architecture, open_checkpoint])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[1, 2]", " must hold an object with the model's fields, not [1, 2]"),
        (b"{", " cannot be read as JSON: "),
        (b'{"a": "\xff"}', " cannot be read as JSON: "),
    ],
    ids=["list", "cut off", "not utf-8"],
)
def test_a_file_that_is_no_object_is_refused(tmp_path, read, content, sentence):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}{sentence}")


@pytest.mark.parametrize("block", [128, [0, 0], [128], [128, 64], [128, 128, 128], [-1, -1], ["128", "128"], None])
def test_blocks_that_are_no_two_equal_positive_integers_are_refused(hf_models, tmp_path, block):
    quantization = {"quant_method": "fp8", "weight_block_size": block}
    folder = config_with(hf_models["qwen3"], tmp_path, {"quantization_config": quantization})
    sentence = refusal(open_checkpoint, folder)
    assert sentence.startswith(f"weights quantised with quant_method fp8 and weight_block_size {block} cannot be read")
    assert "two equal positive integers" in sentence


def test_a_quantization_that_is_no_object_is_refused(hf_models, tmp_path):
    folder = config_with(hf_models["qwen3"], tmp_path, {"quantization_config": "fp8"})
    assert refusal(open_checkpoint, folder) == 'quantization_config must be an object, not "fp8"'
