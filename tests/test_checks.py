"""Inputs that cannot work are refused before anything starts, with the key, the numbers and a remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from etr_megatron import quick_checks
from etr_megatron.check_functions import check_functions
from etr_megatron.checks import check_attention, check_inputs, check_layers
from etr_megatron.config import (
    Config,
    DataConfig,
    EnvironmentConfig,
    InvalidConfigError,
    ModelConfig,
    ObjectiveConfig,
    ObserveConfig,
    ParallelConfig,
    RewardConfig,
    RunConfig,
    load_config,
    resolve,
)
from etr_megatron.errors import UserError
from etr_megatron.observe import RunDirectory
from etr_megatron.quick_checks import adding_input_problems
from etr_megatron.rollout.record import write_record
from etr_megatron.types import Group, Problem, Sample


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=RunConfig(dir=str(tmp_path / "runs")))


def refusal(config: Config, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check_inputs(config, world_size)
    return str(caught.value)


def with_model(config: Config, path: Path) -> Config:
    return replace(config, model=ModelConfig(path=str(path)))


def test_the_default_job_passes(config: Config) -> None:
    check_inputs(config, 2)


def test_an_interpreter_of_servers_that_cannot_be_run_is_told_before_anything_is_started(
    config: Config, tmp_path: Path
) -> None:
    text = tmp_path / "python"
    text.write_text("")
    for path, told in ((tmp_path / "none", "does not exist"), (text, "is not executable")):
        served = replace(
            config,
            rollout=replace(config.rollout, backend="sglang"),
            sglang=replace(config.sglang, python=str(path)),
        )
        assert refusal(served, 2).startswith(f"sglang.python: {path} {told}; ")
    check_inputs(replace(served, rollout=config.rollout), 2)


def test_a_complete_checkpoint_passes(config: Config, hf_models: dict[str, str], tmp_path: Path) -> None:
    config = replace(config, data=DataConfig(max_prompt_tokens=256))  # these models' context is 512
    for model in map(Path, hf_models.values()):
        copy = tmp_path / model.name
        copy.mkdir()
        for file in model.iterdir():
            (copy / file.name).symlink_to(file)
        (copy / "tokenizer.json").write_text("{}")
        check_inputs(with_model(config, copy), 1)


def test_a_missing_model_directory_is_named(config: Config, tmp_path: Path) -> None:
    message = refusal(with_model(config, tmp_path / "nowhere"))
    assert message.startswith(f"model.path: {tmp_path}/nowhere is not a directory")


@pytest.mark.parametrize("key", ["model.path", "data.train"])
def test_a_path_that_the_system_refuses_is_one_sentence(config: Config, key: str) -> None:
    section, name = key.split(".")
    path = "x" * 300 + ".jsonl"
    changed = replace(config, **{section: replace(getattr(config, section), **{name: path})})
    assert refusal(changed) == f"{path[:200]}...: File name too long"


def test_a_directory_that_is_no_checkpoint_is_named(config: Config, tmp_path: Path) -> None:
    assert f"{tmp_path}/config.json does not exist" in refusal(with_model(config, tmp_path))
    (tmp_path / "checkpoints").mkdir()
    wanted = f"`tools/convert_hf.py to-hf --megatron {tmp_path}` creates one from this run"
    assert refusal(with_model(config, tmp_path)).endswith(wanted)


def test_an_unsupported_architecture_is_named_with_the_supported_ones(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    message = refusal(with_model(config, tmp_path))
    assert "GPT2LMHeadModel" in message
    assert all(name in message for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"))


def test_a_config_that_does_not_fit_its_weights_is_refused(config: Config, hf_models: dict[str, str], tmp_path: Path) -> None:
    model = Path(hf_models["qwen3"])
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    broken = json.loads((model / "config.json").read_text())
    broken["intermediate_size"] += 8
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(broken))
    assert "does not fit the weights" in refusal(with_model(config, tmp_path))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "sentence"),
    [
        (14, 2, 4, "m has 14 attention heads, which parallel.tp=4 does not divide; choose a parallel.tp that divides 14"),
        (12, 6, 4, "m has 6 key/value heads, of which parallel.tp=4 is neither a divisor nor a multiple; choose a parallel.tp"),
        (12, 2, 3, "m has 2 key/value heads, of which parallel.tp=3 is neither a divisor nor a multiple; choose a parallel.tp"),
        (64, 1, 64, "m has 32 rows of keys and values, which parallel.tp=64 does not divide; choose a smaller parallel.tp"),
    ],
)
def test_heads_that_tensor_parallel_ranks_cannot_split_are_refused(heads: int, kv_heads: int, tp: int, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_attention("m", heads, kv_heads, 16, tp, ParallelConfig())
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("layers", "pp"), [(6, 4), (2, 4)])
def test_layers_that_stages_cannot_split_are_refused(layers: int, pp: int) -> None:
    with pytest.raises(UserError) as caught:
        check_layers("m", layers, ParallelConfig(pp=pp))
    assert str(caught.value) == (
        f"m has {layers} layers, which parallel.pp={pp} does not divide; choose a parallel.pp that divides {layers}, "
        "or set parallel.first_stage_layers and parallel.last_stage_layers"
    )


def test_heads_that_context_parallel_ranks_cannot_exchange_are_refused() -> None:
    ring, exchange = (ParallelConfig(tp=2, cp=4, cp_comm=how) for how in ("p2p", "a2a"))
    check_attention("m", 16, 4, 16, 2, ring)
    check_attention("m", 16, 8, 16, 2, exchange)
    for kv_heads, held in ((4, 2), (1, 1)):
        with pytest.raises(UserError) as caught:
            check_attention("m", 16, kv_heads, 16, 2, exchange)
        begin = f"m has {held} key/value heads on each of parallel.tp=2 ranks, which parallel.cp=4 must divide"
        assert str(caught.value).startswith(begin)


def test_a_layout_that_splits_evenly_or_shares_heads_passes() -> None:
    check_attention("m", heads=14, kv_heads=2, head_dim=16, tp=2, parallel=ParallelConfig())
    check_attention("m", heads=16, kv_heads=2, head_dim=16, tp=8, parallel=ParallelConfig())
    check_layers("m", 24, ParallelConfig(pp=3))


def test_mlps_that_the_layout_cannot_split_are_refused(config: Config) -> None:
    odd = replace(config, tiny=replace(config.tiny, intermediate_size=193), parallel=ParallelConfig(tp=2))
    assert refusal(odd, 2).startswith("the tiny model has MLPs of width 193 (intermediate_size), which parallel.tp=2 does not")
    check_inputs(replace(odd, parallel=ParallelConfig(tp=1)), 4)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "moe_aux_loss_coef", 0.1),
        ("train", "moe_router_fp32", True),
        ("train", "moe_freeze_router", True),
        ("train", "routing_replay", True),
        ("parallel", "etp", 1),
    ],
)
def test_options_for_experts_are_refused_for_a_model_without_any(
    config: Config, hf_models: dict[str, str], section: str, key: str, value: object
) -> None:
    for model in ("tiny", hf_models["qwen3"]):
        asked = with_model(replace(config, **{section: replace(getattr(config, section), **{key: value})}), Path(model))
        message = refusal(asked)
        assert " has no experts" in message and f"{section}.{key}" in message and "\n" not in message


def test_tp_auto_is_checked_at_the_size_it_will_have(config: Config) -> None:
    odd = replace(config, tiny=replace(config.tiny, intermediate_size=193))
    check_inputs(odd, 1)
    assert "the tiny model has MLPs of width 193 (intermediate_size), which parallel.tp=2" in refusal(odd, world_size=2)
    check_inputs(replace(odd, parallel=ParallelConfig(tp=1)), 2)


@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_missing_data_file_is_named_with_its_key(config: Config, tmp_path: Path, key: str) -> None:
    message = refusal(replace(config, data=DataConfig(**{key: str(tmp_path / "no.jsonl")})))
    assert message.startswith(f"data.{key}: ") and "no.jsonl" in message


def test_an_empty_data_file_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl" in refusal(replace(config, data=DataConfig(train=str(tmp_path / "empty.jsonl"))))


def test_a_missing_column_is_named_with_the_columns_there_are(config: Config, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"problem": "6*7", "answer": "42"}\n')
    message = refusal(replace(config, data=DataConfig(train=str(tmp_path / "train.jsonl"))))
    assert "data.prompt_column" in message and "question" in message and "problem" in message


def test_a_broken_row_is_named_with_its_line(config: Config, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "6*7", "answer": "42"}\n{"question"\n')
    config = replace(config, rollout=replace(config.rollout, prompts_per_step=1))
    data = DataConfig(train=str(tmp_path / "train.jsonl"))
    message = refusal(replace(config, data=data))
    assert "train.jsonl" in message and "2" in message
    check_inputs(replace(config, data=replace(data, on_bad_row="skip")), 1)


def test_training_sets_that_do_not_suffice_for_a_step_together_are_refused(config: Config, tmp_path: Path) -> None:
    for name, rows in (("a", 3), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text(rows * '{"question": "6*7", "answer": "42"}\n')
    data = DataConfig(train={name: str(tmp_path / f"{name}.jsonl") for name in "ab"}, eval=str(tmp_path / "a.jsonl"))
    config = replace(config, data=data, rollout=replace(config.rollout, prompts_per_step=5))
    check_inputs(config, 1)
    assert refusal(replace(config, rollout=replace(config.rollout, prompts_per_step=6))) == (
        "data.train has 5 problems, fewer than a step needs; lower rollout.prompts_per_step=6 or give more data"
    )


def test_a_reward_column_that_no_training_set_has_is_refused_but_not_one_that_some_have(config: Config, tmp_path: Path) -> None:
    row = '{"question": "6*7", "answer": "42", "%s": 1}\n'
    for name in ("kind", "level"):
        (tmp_path / f"{name}.jsonl").write_text(64 * (row % name))
    train = {name: str(tmp_path / f"{name}.jsonl") for name in ("kind", "level")} | {"sums": "arithmetic"}
    reward = RewardConfig(function="tests.rewards:level", columns=("level", "kind"))
    config = replace(config, data=DataConfig(train=train, eval=train["kind"]), reward=reward)
    check_inputs(config, 1)
    assert refusal(replace(config, reward=replace(reward, columns=("level", "kinds")))) == (
        "reward.columns: no training set has values in a column 'kinds'; give the name of a column that at least one of kind, "
        "level, sums has"
    )


def test_a_reward_function_that_cannot_be_imported_is_refused(config: Config) -> None:
    message = refusal(replace(config, reward=RewardConfig(function="no_such_module_here:grade")))
    assert message.startswith("reward.function is 'no_such_module_here:grade'")
    assert "no_such_module_here" in message.partition(": ")[2]
    assert "floor_lamp" in refusal(replace(config, reward=RewardConfig(function="math:floor_lamp")))
    assert refusal(replace(config, reward=RewardConfig(function="math:fsum"))) == (
        "reward.function is 'math:fsum': it must be callable with three arguments, the prompt, the response and the answer "
        "(a fourth is given with reward.columns)"
    )
    check_inputs(replace(config, reward=RewardConfig(function="tests.rewards:digit_sum_is_even")), 1)


def test_an_environment_that_cannot_be_imported_is_refused_where_it_is_called(config: Config) -> None:
    def with_function(name: str) -> Config:
        return replace(config, environment=EnvironmentConfig(function=name))

    message = refusal(with_function("no_such_module_here:play"))
    assert message.startswith("environment.function is 'no_such_module_here:play': importing no_such_module_here failed")
    assert refusal(with_function("math:gamma")) == (
        "environment.function is 'math:gamma': it must be callable with three arguments, the messages, the answer and a dict "
        "of reward.columns"
    )
    check_inputs(with_function("tests.environments:said"), 1)
    replayed = with_function("no_such_module_here:play")
    check_functions(replace(replayed, rollout=replace(config.rollout, replay="runs/a")))


def test_a_loss_that_cannot_be_imported_or_called_is_refused(config: Config) -> None:
    message = refusal(replace(config, objective=ObjectiveConfig(loss="no_such_module_here:loss")))
    assert message.startswith("objective.loss is 'no_such_module_here:loss': importing no_such_module_here failed")
    assert "floor_lamp" in refusal(replace(config, objective=ObjectiveConfig(loss="math:floor_lamp")))
    assert "is not callable" in refusal(replace(config, objective=ObjectiveConfig(loss="math:pi")))
    assert "one argument" in refusal(replace(config, objective=ObjectiveConfig(loss="math:fmod")))
    check_inputs(replace(config, objective=ObjectiveConfig(loss="tests.test_policy_losses:pull_up")), 1)
    check_inputs(replace(config, objective=ObjectiveConfig(preset="gspo")), 1)


def test_a_used_run_directory_is_refused_without_resume(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    check_inputs(config, 1)
    message = refusal(replace(config, checkpoint=replace(config.checkpoint, resume=False)))
    assert message.startswith(f"{run} holds an earlier run")


def test_every_problem_is_told_at_once(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    broken = replace(
        with_model(config, tmp_path / "nowhere"),
        data=DataConfig(train=str(tmp_path / "no.jsonl"), eval=None),
        observe=ObserveConfig(wandb_project="etr"),
    )
    model, data, wandb = refusal(broken).splitlines()
    assert model.startswith("model.path") and data.startswith("data.train") and "pip install wandb" in wandb


def told_beside(tmp_path: Path, *overrides: str) -> list[str]:
    """All messages for a config with a misspelled key and `overrides`, except the one about that key."""
    with pytest.raises(InvalidConfigError) as caught, adding_input_problems():
        load_config(None, [f"run.dir={tmp_path}/runs", "train.lrr=1", *overrides])
    head, misspelled, *others = str(caught.value).splitlines()
    assert head == f"invalid configuration, {1 + len(others)} problem{'s' if others else ''}:" and "train.lrr" in misspelled
    return [other.removeprefix("  - ") for other in others]


def test_what_a_wrong_config_names_and_is_not_there_is_told_with_its_other_mistakes(tmp_path: Path) -> None:
    there = ["reward.function=tests.rewards:always_fails", f"data.train={__file__}"]  # read later, if at all
    assert told_beside(tmp_path, *there) == []
    missing = [
        f"model.path={tmp_path}/m",
        f"data.eval={tmp_path}/no.jsonl",
        "reward.function=nobody:f",
        "objective.loss=nobody:f",
    ]
    replayed = [f"rollout.replay={tmp_path}/r", "eval.every=0"]
    told = told_beside(tmp_path, *missing, *replayed)
    beginnings = [
        "model.path: ",
        "data.eval: ",
        "reward.function is ",
        "objective.loss is ",
        "rollout.replay: ",
    ]
    assert [line[: len(one)] for line, one in zip(told, beginnings, strict=True)] == beginnings


def test_rows_and_the_models_description_are_checked_beside_a_wrong_config(
    hf_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?"}\n')
    data = [f"data.train={rows}", "data.eval=null", "eval.every=0"]
    (told,) = told_beside(tmp_path, *data)
    assert told.startswith("data.train: rows.jsonl:2 of")
    (told,) = told_beside(tmp_path, *data, "data.answer_colum=reply")
    assert told.startswith("data.answer_colum (command line): unknown key")
    monkeypatch.setattr(quick_checks, "_MAX_FILE_BYTES", 10)
    assert told_beside(tmp_path, *data) == []
    untokenized = tmp_path / "model"
    untokenized.mkdir()
    (untokenized / "config.json").write_bytes((Path(hf_models["qwen3"]) / "config.json").read_bytes())
    tokenizer, context = told_beside(tmp_path, f"model.path={untokenized}")
    assert "has no tokenizer" in tokenizer and "has a context of" in context
    (untokenized / "config.json").write_text('{"architectures": ["BertModel"]}')
    (told,) = told_beside(tmp_path, f"model.path={untokenized}")
    assert "BertModel" in told


def test_what_goes_by_a_key_that_is_wrong_itself_is_not_told_beside_it(tmp_path: Path) -> None:
    pathless = told_beside(
        tmp_path, "model.pth=/nowhere", "data.train=", "reward.function=no", "rollout.replay=", "eval.every=0"
    )
    assert [line.split(" ")[0] for line in pathless] == ["model.pth", "data.train", "reward.function"]
    counted = told_beside(tmp_path, "run.steps=many", f"rollout.replay={tmp_path}/r", "eval.every=0")
    assert [line.split(" ")[0] for line in counted] == ["run.steps", "rollout.replay:"]  # whether it exists needs no number


def test_a_recorded_run_of_another_size_is_told_with_other_mistakes(tmp_path: Path) -> None:
    sample = Sample(0, [5], [-0.1], "stop", 4, "x", 1.0, "ok")
    write_record(tmp_path / "r", 1, [Group("a", Problem("a", "?", "1", [1]), [sample])], {}, None)
    (tmp_path / "r").rename(tmp_path / "recorded")
    (told,) = told_beside(tmp_path, f"rollout.replay={tmp_path}", "eval.every=0", "run.steps=1", "train.minibatches=1")
    assert "set rollout.prompts_per_step=1 and rollout.samples_per_prompt=1 to replay it" in told


def test_a_layout_that_cannot_be_is_told_together_with_what_is_not_there(tmp_path: Path) -> None:
    config = load_config(None, [f"model.path={tmp_path}/m", "parallel.tp=2"])
    told = r"on 3 ranks, 2 problems:\n  - parallel\.tp = 2.*\n  - model\.path: "
    with pytest.raises(InvalidConfigError, match=told), adding_input_problems():
        resolve(config, 3, cuda=False)


def test_training_does_not_begin_where_it_would_remove_what_was_only_recorded(config: Config) -> None:
    directory = RunDirectory(Path(config.run.dir) / config.run.name)
    directory.prepare(config)
    directory.recorded.mkdir()
    (directory.recorded / "reached.safetensors").write_bytes(b"")
    directory.write_status("finished", 2, 2)
    assert refusal(config, 2).startswith(f"{directory.recorded} holds steps recorded by --rollout-only, which training")
    check_inputs(replace(config, rollout=replace(config.rollout, only=True)), 2)  # it continues after the recorded steps
    (directory.recorded / "reached.safetensors").unlink()
    for only in (False, True):
        asked = replace(config, rollout=replace(config.rollout, only=only))
        assert refusal(asked, 2).startswith(f"{directory.root} holds a finished run without a checkpoint to continue from")


def test_a_reward_named_by_its_file_is_told_how_a_module_is_named(config: Config) -> None:
    message = refusal(replace(config, reward=RewardConfig(function="my_rewards.py:score")))
    assert "my_rewards.py is a file name; give the module's name, without .py" in message
