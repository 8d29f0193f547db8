"""Every shipped config for GPUs: valid, within memory, and the model can be built in its layout. Needs no GPU."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from etr_megatron.config import load_config, to_dict
from etr_megatron.errors import UserError
from etr_megatron.planner import make_plan
from etr_megatron.planner.dry_run import check_ranks, distinct_ranks, dry_run
from etr_megatron.platform import prepare_megatron
from tests import warm

CONFIGS = Path(__file__).parents[1] / "configs"
PROMISED = (
    "qwen3_8b_8gpu",
    "llama3.1_8b_8gpu",
    "qwen2.5_math_7b_8gpu",
    "qwen2.5_32b_32gpu",
    "qwen3_32b_32gpu",
    "qwen3_32b_64gpu_async",
    "qwen3_30b_a3b_32gpu",
    "llama3.1_70b_128gpu",
    "glm4.5_air_64gpu",
    "glm4.7_flash_16gpu",
    "deepseek_v3_256gpu",
)
LORA = ("qwen3_32b_8gpu_lora", "llama3.1_70b_16gpu_lora", "qwen3_30b_a3b_8gpu_lora")
LARGE = {"qwen3_30b_a3b_32gpu", "llama3.1_70b_128gpu", "glm4.5_air_64gpu", "glm4.7_flash_16gpu"}
SAMPLED = {"deepseek_v3_256gpu"}  # all ranks would take minutes; the dry run builds the ends of every stage
SERVED_IN_BF16 = {"glm4.5_air_64gpu_fp8"}  # at its servers' TP, MLPs are not split into whole blocks
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*gpu*.yaml"))


def gpus_of(name: str) -> int:
    found = re.search(r"(\d+)gpu", name)
    assert found
    return int(found[1])


def test_all_promised_configs_are_there_each_with_a_variant_in_fp8() -> None:
    assert sorted([*PROMISED, *(f"{name}_fp8" for name in PROMISED), *LORA]) == SHIPPED


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SAMPLED)) for name in SHIPPED])
def test_a_shipped_config_passes_its_dry_run(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith("_fp8") or name == "qwen3_30b_a3b_8gpu_lora":
        # It holds the tensors of the variant without FP8; all ranks of one stage, with equally many experts, are alike.
        monkeypatch.setattr("etr_megatron.planner.dry_run.distinct_ranks", lambda _plan: [0])
    dry_run(["--config", str(CONFIGS / f"{name}.yaml"), "--gpus", str(gpus_of(name))])
    said = capsys.readouterr().out
    assert "\nfits: rank" in said
    assert "built without memory: their parameters are those of the weight map and the plan" in said
    if name in LORA:
        text = (CONFIGS / f"{name}.yaml").read_text()
        promised = re.search(r"\n# Planned: (.* usable GiB), and (.* GiB of a node's memory) for", text)
        assert promised and all(words in said for words in promised.groups())


@pytest.fixture
def built_once_for_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that Megatron gives the same stage, tensor-parallel and expert-parallel rank share the model that was built for the
    first of them; nothing else of a rank enters it. That the weight map has a rank at the same place as Megatron is shown in
    test_weight_map_layouts.py."""
    prepare_megatron()
    from etr_megatron.policy import model
    from etr_megatron.policy.parallel import mpu

    build, built = model.build_chunks, {}

    def build_once(*arguments: Any) -> Any:
        place = (
            mpu.get_pipeline_model_parallel_rank(),
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_expert_model_parallel_rank(),
            mpu.get_expert_tensor_parallel_rank(),
        )
        if place not in built:
            built[place] = build(*arguments)
        return built[place]

    monkeypatch.setattr(model, "build_chunks", build_once)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in PROMISED if name not in SAMPLED]
)
@pytest.mark.usefixtures("built_once_for_replicas")
def test_every_rank_of_a_shipped_layout_is_the_model_that_is_built(name: str) -> None:
    plan = make_plan(load_config(CONFIGS / f"{name}.yaml"), gpus_of(name))
    assert len(plan.ranks) in (gpus_of(name), gpus_of(name) // 2)  # all GPUs train, or half of them run servers
    check_ranks(plan, range(len(plan.ranks)))


@pytest.mark.slow
@pytest.mark.usefixtures("built_once_for_replicas")
def test_every_rank_of_a_64_gpu_layout_with_uneven_stages_is_the_model_that_is_built() -> None:
    overrides = ["parallel.first_stage_layers=15", "parallel.last_stage_layers=13", "parallel.cp=2", "parallel.tp=8"]
    plan = make_plan(load_config(CONFIGS / "qwen3_32b_32gpu.yaml", overrides), 64)
    check_ranks(plan, range(64))
    assert len({rank.elements for rank in plan.ranks}) == 3


def test_a_tied_embedding_is_built_in_the_first_and_the_last_stage(hf_models: dict[str, str]) -> None:
    lengths = ["data.max_prompt_tokens=32", "rollout.max_response_tokens=32"]
    plan = make_plan(load_config(None, [f"model.path={hf_models['qwen2']}", "parallel.tp=1", "parallel.pp=2", *lengths]), 2)
    assert plan.arch.tied_embeddings
    check_ranks(plan, range(2))


def test_distinct_ranks_are_the_ends_of_every_stage() -> None:
    plan = make_plan(load_config(CONFIGS / "llama3.1_70b_128gpu.yaml"), 128)
    assert distinct_ranks(plan) == [0, 31, 32, 63, 64, 95, 96, 127]


def test_a_plan_that_counts_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etr_megatron.planner.dry_run.elements_built", lambda *_: (5, 0))
    plan = make_plan(load_config(CONFIGS / "qwen3_8b_8gpu.yaml"), 8)
    with pytest.raises(RuntimeError, match=r"rank 3 has 5 parameters, the plan says 4\d{9}"):
        check_ranks(plan, [3])


@pytest.mark.parametrize("name", PROMISED)
def test_a_variant_in_fp8_differs_in_nothing_but_fp8_and_the_room_that_it_takes(name: str) -> None:
    plain, fp8 = (to_dict(load_config(CONFIGS / f"{file}.yaml")) for file in (name, f"{name}_fp8"))
    different = {f"{section}.{key}" for section in plain for key in plain[section] if plain[section][key] != fp8[section][key]}
    needed = {"run.name", "fp8.recipe"} | (set() if f"{name}_fp8" in SERVED_IN_BF16 else {"sglang.fp8"})
    of_servers = {f"sglang.{key}" for key in ("mem_fraction", "tp", "nodes_per_server", "concurrency", "arguments")}
    assert needed <= different <= needed | of_servers


def test_up_projections_of_latents_that_are_split_within_blocks_are_not_served_in_fp8() -> None:
    with pytest.raises(UserError, match=r"kv_b_proj\.weight is split into parts of 2240 x 512 by .*; lower sglang\.tp"):
        make_plan(load_config(CONFIGS / "glm4.7_flash_16gpu_fp8.yaml", ["sglang.dp_attention=1"]), 16)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_named_after_its_file_and_needs_no_other_number_of_gpus(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.run.name == name
    assert (CONFIGS / "models" / Path(config.model.path).name).is_dir()


def test_too_little_memory_is_one_sentence_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"does not fit on GPUs of 64 GiB: rank \d+ needs .* one of these makes it fit: "):
        dry_run(["--config", str(CONFIGS / "qwen3_32b_32gpu.yaml"), "--gpus", "32", "--gpu-memory", "64"])


def test_a_layout_that_the_gpus_do_not_divide_into_is_told() -> None:
    with pytest.raises(UserError, match="world size 24 is not divisible"):
        dry_run(["--config", str(CONFIGS / "qwen3_32b_32gpu.yaml"), "--gpus", "24"])


def test_a_server_in_fp8_that_cannot_cut_whole_blocks_is_refused() -> None:
    config = str(CONFIGS / "qwen3_30b_a3b_32gpu_fp8.yaml")
    with pytest.raises(
        UserError, match=r"experts\.0\.gate_proj\.weight is split into parts of 192 x 2048 by sglang\.tp=4, sglang\.ep=1"
    ):
        dry_run(["--config", config, "--gpus", "32", "sglang.ep=1"])


def test_a_model_whose_mlps_are_no_whole_blocks_is_not_served_in_fp8() -> None:
    config = str(CONFIGS / "glm4.5_air_64gpu_fp8.yaml")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.gate_proj\.weight is .*; no sglang\.tp gives such; set"):
        dry_run(["--config", config, "--gpus", "64", "sglang.fp8=true"])


def test_a_checkpoint_that_is_there_is_compared_with_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "models" / "Qwen3-8B" / "config.json").read_text())
    with pytest.raises(UserError, match=str(tmp_path)):
        dry_run(["--config", str(CONFIGS / "qwen3_8b_8gpu.yaml"), "--gpus", "8", f"model.path={tmp_path}"])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["launch", "train"])
def test_a_reader_who_leaves_ends_a_dry_run_without_a_word(module: str) -> None:
    command = [sys.executable, "-m", f"etr_megatron.{module}", "--dry-run", str(CONFIGS / "qwen3_8b_8gpu.yaml"), "--gpus", "8"]
    with warm.start(command, {**os.environ}) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.slow
def test_the_entry_point_dry_runs_and_a_mistake_ends_it_with_2() -> None:
    config = str(CONFIGS / "qwen3_8b_8gpu.yaml")
    command = [sys.executable, "-m", "etr_megatron.train", "--dry-run", "--config", config, "--gpus"]
    done = warm.start([*command, "8"], {**os.environ})
    said, told = done.communicate()
    assert (done.returncode, told) == (0, "")
    assert "fits: rank" in said
    wrong = warm.start([*command, "9"], {**os.environ})
    _, told = wrong.communicate()
    assert wrong.returncode == 2
    assert told.startswith("error: --gpus 9 is not a multiple")


def test_a_dry_run_reads_the_problems_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, absent, broken = (str(tmp_path / f"{name}.jsonl") for name in ("good", "absent", "broken"))
    Path(good).write_text('{"problem": "1+1?", "answer": "2"}\n')
    Path(broken).write_text('{"problem": "1+1?"}\n')
    job = ["--config", str(CONFIGS / "qwen3_8b_8gpu.yaml"), "--gpus", "8"]
    dry_run([*job, "data.prompt_column=problem", f"data.train={{a: {good}, b: {absent}}}", "data.eval=owner/set"])
    assert capsys.readouterr().out.splitlines()[-4:-1] == [
        f"{good} has rows that can be used",
        f"{absent} is not here: its rows were not checked",
        "owner/set was not fetched: its rows were not checked",
    ]
    with pytest.raises(UserError) as told:
        dry_run([*job, f"data.train={good}", f"data.eval={broken}", "reward.function=nobody:score"])
    assert [line.partition(":")[0] for line in str(told.value).splitlines()] == [
        "data.train",
        "data.eval",
        "reward.function is 'nobody",
    ]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"data.train": "list.json"}, "data.train: '{0}/list.json' is neither .jsonl nor .parquet"),
        ({"data.train": "one.jsonl"}, "data.train has 1 problem, fewer than a step needs; lower rollout.prompts_per_step=64"),
        ({"data.train": "empty"}, "data.train: dataset '{0}/empty'"),
    ],
)
def test_a_dry_run_refuses_problems_that_a_job_would_refuse(tmp_path: Path, data: dict[str, str], told: str) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "one.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    (tmp_path / "empty").mkdir()
    job = ["--config", str(CONFIGS / "qwen3_8b_8gpu.yaml"), "--gpus", "8", "data.eval=null"]
    columns = ["data.prompt_column=question", "data.answer_column=answer"]
    with pytest.raises(UserError) as refused:
        dry_run([*job, *columns, *(f"{key}={tmp_path / name}" for key, name in data.items())])
    assert str(refused.value).startswith(told.format(tmp_path))


def test_a_dry_run_refuses_a_reward_column_that_no_training_set_has(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(64 * '{"question": "1+1?", "answer": "2", "level": 1}\n')
    job = [
        "--config",
        str(CONFIGS / "qwen3_8b_8gpu.yaml"),
        "--gpus",
        "8",
        "data.eval=null",
        "reward.function=tests.rewards:level",
    ]
    columns = ["data.prompt_column=question", "data.answer_column=answer", "reward.columns=[level, levels]"]
    sets = f"data.train={{a: {tmp_path / 'a.jsonl'}, b: {tmp_path / 'b.jsonl'}}}"
    with pytest.raises(
        UserError, match=r"^reward\.columns: no training set has values in a column 'levels'; give .* of a, b has$"
    ):
        dry_run([*job, *columns, sets])


def test_the_names_of_gpus_are_taken_in_capitals_too(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(["--config", str(CONFIGS / "qwen3_8b_8gpu.yaml"), "--gpus", "8", "--gpu", "H200"])
    assert "GPUs       8 of 141 GiB" in capsys.readouterr().out
