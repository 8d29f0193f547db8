"""External servers: their reported settings against what would be sent to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from etr_megatron.config import SglangConfig
from etr_megatron.rollout.sglang.fits import Expected
from etr_megatron.weights import read_architecture
from tests.fake_servers import servers

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture
def served(hf_models, tmp_path):
    """Writes the config.json that a server was started with; returns what it then reports at /server_info."""

    def write(family: str = "qwen3", **changes) -> dict:
        config = json.loads((Path(hf_models[family]) / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return {"model_path": str(tmp_path), "tp_size": 1, "dtype": "auto", "quantization": None}

    return write


def expected(hf_models, family: str = "qwen3", **settings) -> Expected:
    return Expected.of(SglangConfig(urls=("http://a:1",), **settings), read_architecture(hf_models[family]), "bfloat16")


def says(family: str, name: str) -> dict:
    return {"model_type": family, "architectures": [name]}


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen2", "qwen3", "qwen3_tied", "qwen3_moe", "qwen3_moe_dense", "glm4_moe", "glm4_moe_air"),
        *("deepseek_v3", "glm4_moe_lite"),
    ],
)
def test_a_server_of_the_jobs_model_fits_and_so_does_one_that_says_nothing(hf_models, served, family):
    job = expected(hf_models, family)
    config = json.loads((Path(hf_models[family]) / "config.json").read_text())
    assert job.misfit(served(family), says(config["model_type"], config["architectures"][0])) is None
    assert job.misfit(served(family), {}) is None
    assert job.misfit({}, {}) is None
    assert (
        job.misfit({"model_path": "org/name", "tp_size": None, "json_model_override_args": "{"}, {"architectures": None})
        is None
    )
    assert job.misfit({"model_path": "/nowhere"}, says("other", "OtherForCausalLM")) is None


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("qwen3", {"vocab_size": 300}, "its vocab_size is 300 according to {}, but the job's is 301"),
        ("qwen3", {"hidden_size": 64}, "its hidden_size is 64 according to {}, but the job's is 48"),
        ("qwen3", {"intermediate_size": 96}, "its intermediate_size is 96 according to {}, but the job's is 80"),
        ("qwen3", {"num_hidden_layers": 5}, "its num_hidden_layers is 5 according to {}, but the job's is 4"),
        ("qwen3", {"num_key_value_heads": 4}, "its num_key_value_heads is 4 according to {}, but the job's is 2"),
        ("qwen3", {"tie_word_embeddings": True}, "its tie_word_embeddings is True according to {}, but the job's is False"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 8}, "its num_experts is 8 according to {}, but the job's is 6"),
        ("qwen3_moe", {"moe_intermediate_size": 32}, "its moe_intermediate_size is 32 according to {}, but the job's is 28"),
        ("glm4_moe", {"n_routed_experts": 8}, "its n_routed_experts is 8 according to {}, but the job's is 6"),
        ("glm4_moe", {"n_shared_experts": 1}, "its n_shared_experts is 1 according to {}, but the job's is 2"),
        ("glm4_moe", {"first_k_dense_replace": 2}, "its first_k_dense_replace is 2 according to {}, but the job's is 1"),
        ("qwen3_moe", {"num_experts_per_tok": 2}, "its num_experts_per_tok is 2 according to {}, but the job's is 3"),
        ("glm4_moe", {"routed_scaling_factor": 1}, "its routed_scaling_factor is 1 according to {}, but the job's is 2.5"),
        ("glm4_moe_air", {"use_qk_norm": True}, "its use_qk_norm is True according to {}, but the job's is False"),
        ("deepseek_v3", {"kv_lora_rank": 24}, "its kv_lora_rank is 24 according to {}, but the job's is 26"),
        ("deepseek_v3", {"q_lora_rank": None}, "its q_lora_rank is null according to {}, but the job's is 22"),
        ("glm4_moe_lite", {"q_lora_rank": 22}, "its q_lora_rank is 22 according to {}, but the job's is None"),
        ("deepseek_v3", {"qk_nope_head_dim": 8}, "its qk_nope_head_dim is 8 according to {}, but the job's is 12"),
        ("deepseek_v3", {"qk_rope_head_dim": 4}, "its qk_rope_head_dim is 4 according to {}, but the job's is 8"),
        ("deepseek_v3", {"v_head_dim": 12}, "its v_head_dim is 12 according to {}, but the job's is 14"),
        ("deepseek_v3", {"n_group": 2}, "its n_group is 2 according to {}, but the job's is 4"),
        ("deepseek_v3", {"topk_group": 1}, "its topk_group is 1 according to {}, but the job's is 2"),
        ("qwen3", {"quantization_config": BLOCKS}, "its quantization_config is of fp8, but sglang.fp8 is false"),
    ],
)
def test_sizes_that_shapes_follow_from_are_compared(hf_models, served, tmp_path, family, changes, problem):
    server = served(family, **changes)
    assert expected(hf_models, family).misfit(server, {}) == problem.format(tmp_path / "config.json")


def test_a_server_that_cannot_say_which_experts_it_chose_is_refused_where_they_are_replayed(hf_models, served):
    job, plain = replace(expected(hf_models, "qwen3_moe"), routing=True), expected(hf_models, "qwen3_moe")
    server = served("qwen3_moe") | {"enable_return_routed_experts": False}
    assert job.misfit(server, {}) == "it was started without --enable-return-routed-experts, which train.routing_replay needs"
    assert plain.misfit(server, {}) is None
    assert job.misfit(server | {"enable_return_routed_experts": True}, {}) is None
    able = server | {"enable_return_routed_experts": True}
    for kernel in ("auto", "triton", "flashinfer_trtllm_routed"):
        assert job.misfit(able | {"moe_runner_backend": kernel}, {}) is None
    silent = able | {"moe_runner_backend": "flashinfer_trtllm"}
    assert job.misfit(silent, {}) == (
        "its moe_runner_backend is flashinfer_trtllm, which does not report the experts that it chooses, as "
        "train.routing_replay needs; start it with --moe-runner-backend triton"
    )
    assert plain.misfit(silent, {}) is None


def test_a_file_at_the_same_path_that_is_of_another_model_than_the_server_says_is_not_believed(hf_models, served):
    server = served(hidden_size=64)
    job = expected(hf_models)
    assert job.misfit(server, says("qwen3", "Qwen3ForCausalLM")) is not None
    assert job.misfit(server, says("qwen3_variant", "Qwen3ForCausalLM")) is None


def test_what_was_told_beside_the_file_comes_before_it(hf_models, served):
    server = served(hidden_size=64, quantization_config=BLOCKS)
    server["json_model_override_args"] = json.dumps({"hidden_size": 48, "quantization_config": None})
    assert expected(hf_models).misfit(server, {}) is None


@pytest.mark.parametrize(
    ("stored", "quantization", "problem"),
    [
        (BLOCKS, None, None),
        (None, "fp8", None),
        (None, None, "its quantization_config is null, but sglang.fp8 is true"),
        ({"quant_method": "awq"}, None, "its quantization_config is of awq, but sglang.fp8 is true"),
        (BLOCKS | {"weight_block_size": [64, 64]}, None, "its weight_block_size is [64, 64], but sglang.fp8 needs [128, 128]"),
    ],
)
def test_a_job_with_fp8_wants_servers_with_its_blocks(hf_models, served, stored, quantization, problem):
    server = served(**({} if stored is None else {"quantization_config": stored})) | {"quantization": quantization}
    assert expected(hf_models, fp8=True).misfit(server, {}) == problem


def test_workers_are_counted_where_the_sync_depends_on_them(hf_models):
    server = {"tp_size": 2}
    assert expected(hf_models).misfit(server, {}) == "its tp_size is 2, but sglang.tp is 1"
    assert expected(hf_models, tp=2).misfit(server, {}) is None
    assert expected(hf_models, sync="disk").misfit(server, {}) is None


def test_servers_that_are_replicas_are_refused_unless_only_their_attention_is(hf_models):
    server = {"tp_size": 2, "dp_size": 3, "enable_dp_attention": False}
    problem = expected(hf_models, tp=2).misfit(server, {})
    assert problem is not None and problem.startswith("its dp_size is 3 without --enable-dp-attention, so SGLang allows no")
    assert expected(hf_models, tp=2, sync="disk").misfit(server, {}) is None
    assert expected(hf_models, tp=2).misfit(server | {"dp_size": 1}, {}) is None


def test_groups_of_attention_are_counted_where_the_sync_depends_on_them(hf_models):
    server = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}
    for groups, problem in ((1, "its dp_size is 2, but sglang.dp_attention is 1"), (2, None)):
        assert expected(hf_models, tp=4, dp_attention=groups).misfit(server, {}) == problem
    assert expected(hf_models, tp=4, sync="disk").misfit(server, {}) is None


def test_another_dtype_is_worth_a_word_and_no_refusal(hf_models):
    job = expected(hf_models)
    assert job.other_dtype({"dtype": "half"}) == "float16" and job.misfit({"dtype": "half"}, {}) is None
    assert [job.other_dtype(said) for said in ({"dtype": "bfloat16"}, {"dtype": "auto"}, {})] == [None] * 3


def test_a_server_of_another_model_is_refused_before_it_is_sent_anything(gangs, hf_models, tmp_path):
    other = {"/model_info": says("llama", "LlamaForCausalLM")}
    with servers({}, {"says": other}) as urls:
        (error,) = gangs(1).run("tests.sglang_jobs:refused", model=hf_models["qwen3"], directory=str(tmp_path), urls=urls)
    assert error == (
        f"UserError: SGLang server 1 at {urls[1]} cannot take the job's weights: "
        "its architectures are ['LlamaForCausalLM'], but the job's model is of qwen3"
    )
