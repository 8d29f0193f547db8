"""YAML and overrides become a Config; all problems are reported at once, with their source."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from etr_megatron.config import Config, ObjectiveConfig, dump_yaml, load_config, resolve, to_dict
from etr_megatron.errors import UserError


def message(path: str | Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_samples_are_given_for_all_held_out_sets_or_by_set():
    sets = ("data.eval={aime24: a.jsonl, 7: b.jsonl}", "eval.temperature=1")
    assert load_config(None, [*sets, "eval.samples={aime24: 32, 7: 4}"]).eval.samples == {"aime24": 32, "7": 4}
    assert load_config(None, [*sets, "eval.samples=4"]).eval.samples == 4


def test_an_override_may_set_one_entry_of_a_mapping():
    loss = "objective.loss=mine:loss"
    options = ["objective.options={a: 1, b: 3}", "objective.options.b=2", "objective.options.c.d=4"]
    assert load_config(None, [loss, *options]).objective.options == {"a": 1.0, "b": 2.0, "c.d": 4.0}
    assert load_config(None, [loss, *options, "objective.options={}"]).objective.options == {}
    with pytest.raises(UserError) as error:
        load_config(None, [loss, "objective.options.margin=wide", "eval.samples.aime24=4"])
    no_entry, wide = str(error.value).splitlines()[1:]
    assert wide == "  - objective.options.margin = wide (command line): must be a finite number"
    # It may be a number, too.
    assert no_entry == "  - eval.samples.aime24 (command line): give the whole mapping, as eval.samples={aime24: value}"


def test_without_a_file_the_defaults_hold():
    assert load_config(None, []) == Config()


def test_file_then_overrides_and_the_last_override_wins(tmp_path):
    path = write(tmp_path, "train:\n  lr: 2e-5\n  clip_grad: 3\nrun:\n  steps: 7\nobserve:\n")
    config = load_config(path, ["run.steps=8", "run.steps=9"])
    assert (config.train.lr, config.train.clip_grad, config.run.steps) == (2e-5, 3.0, 9)
    assert isinstance(config.train.clip_grad, float)


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.lr=.5", "train", "lr", 0.5),
        ("parallel.tp=auto", "parallel", "tp", "auto"),
        ("parallel.tp=4", "parallel", "tp", 4),
        ("data.eval=null", "data", "eval", None),
        ("data.eval=", "data", "eval", None),
        ("data.eval='null'", "data", "eval", "null"),
        ("data.eval=my problems.jsonl", "data", "eval", "my problems.jsonl"),
        ("data.eval={aime24: a.jsonl, 7: owner/b:main}", "data", "eval", {"aime24": "a.jsonl", "7": "owner/b:main"}),
        ("data.train={sums: arithmetic, b: b.parquet}", "data", "train", {"sums": "arithmetic", "b": "b.parquet"}),
        ("data.eval={math-v1.0_b: 'b@c[:9]'}", "data", "eval", {"math-v1.0_b": "b@c[:9]"}),
        ("eval.samples=1", "eval", "samples", 1),
        ("data.prompt_column=reward_model.x: y", "data", "prompt_column", "reward_model.x: y"),
        ("data.prompt_column=[question, problem]", "data", "prompt_column", ("question", "problem")),
        ("data.eval=a: [b", "data", "eval", "a: [b"),
        ("data.prompt_column='[question]'", "data", "prompt_column", "[question]"),
        ("data.id_column=[a, b.c]", "data", "id_column", ("a", "b.c")),
        ("data.id_column=null", "data", "id_column", None),
        ("eval.max_response_tokens=null", "eval", "max_response_tokens", None),
        ("rollout.max_logprob_gap=1e-2", "rollout", "max_logprob_gap", 1e-2),
        ("objective.micro=none", "objective", "micro", "none"),
        ("objective.micro=null", "objective", "micro", None),
        ("objective.normalize=false", "objective", "normalize", False),
        ("objective.loss=my.losses:f", "objective", "loss", "my.losses:f"),
        ("objective.dual_clip=3", "objective", "dual_clip", 3.0),
        ("run.steps=1_0_00", "run", "steps", 1000),
        ("train.lr=1_0.25", "train", "lr", 10.25),
        ("checkpoint.resume=off", "checkpoint", "resume", False),
        ("reward.extract=[boxed, hash]", "reward", "extract", ("boxed", "hash")),
        ("arithmetic.operators=['+', \"-\"]", "arithmetic", "operators", ("+", "-")),
        ("run.name=2024", "run", "name", "2024"),
        ("run.name=yes", "run", "name", "yes"),
        ("data.train=a=b.jsonl", "data", "train", "a=b.jsonl"),
        (
            "data.chat_template_kwargs={enable_thinking: false, budget: 8, scale: 0.5, mode: off, level: 'true'}",
            "data",
            "chat_template_kwargs",
            {"enable_thinking": False, "budget": 8, "scale": 0.5, "mode": False, "level": "true"},
        ),
        ("data.prompt_template=Q: {prompt}", "data", "prompt_template", "Q: {prompt}"),
        ("data.prompt_template={prompt}: x", "data", "prompt_template", "{prompt}: x"),
        ('data.prompt_template="{prompt}\\nA:"', "data", "prompt_template", "{prompt}\nA:"),
    ],
)
def test_override_is_coerced_to_the_annotation(override, section, name, value):
    found = getattr(getattr(load_config(None, [override]), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps=true", "whole number"),
        ("run.steps=1.5", "whole number"),
        ("run.steps=1e3", "whole number"),
        ("run.steps='5'", "whole number"),
        ("run.steps=1_", "whole number"),
        ("train.lr=1__0", "a finite number"),
        ("train.lr=false", "a finite number"),
        ("train.lr=.nan", "a finite number"),
        ("train.lr=1e999", "a finite number"),
        ("train.lr=[1", "a finite number"),
        ("checkpoint.resume=1", "true or false"),
        ("parallel.tp=two", 'a whole number or "auto"'),
        ("parallel.tp=true", 'a whole number or "auto"'),
        ("objective.preset=ppo", 'one of "etr", "grpo", "dapo"'),
        ("objective.kl_in=advantage", 'one of "loss", "reward" or null'),
        ("objective.normalize=1", "true or false or null"),
        ("objective.micro=cube", 'one of "tanh", "linear", "none" or null'),
        ("reward.extract=boxed", "a list of strings"),
        ("objective.options=0.1", "a mapping of names to numbers, such as {a: 0.5, b: 2}"),
        ("objective.options={margin: wide}", "a mapping of names to numbers"),
        ("objective.options={margin: 1, margin: 2}", "each name once"),
        ("reward.extract=[boxed", "a list of strings"),
        ("objective.options={margin: 1", "a mapping of names to numbers"),
        ("data.eval={a: b.jsonl", "a mapping of names to text, such as {a: b}"),
        ("data.train=[a.jsonl, b.jsonl]", "a mapping of names to text, such as {a: b}"),
        ("eval.samples={a: 1", "a mapping of names to whole numbers, such as {a: 1, b: 2} or a whole number"),
        ("eval.samples={a: 0.5}", "a mapping of names to whole numbers, such as {a: 1, b: 2}"),
        ("eval.samples=many", "a mapping of names to whole numbers, such as {a: 1, b: 2} or a whole number"),
        ("data.eval=[a.jsonl, b.jsonl]", "a mapping of names to text, such as {a: b}"),
        ("data.eval={a: [b.jsonl]}", "a mapping of names to text, such as {a: b}"),
        ("data.eval={a: b.jsonl, a: c.jsonl}", "a mapping of names to text, such as {a: b}, each name once"),
        ("data.eval={b.jsonl}", "a mapping of names to text, such as {a: b}"),
        (
            "data.eval={a: b@c[:9]}",
            "such as {a: b} or text or null; quote text that contains brackets, a comma or a colon",
        ),
        ("data.eval={[a]: b.jsonl}", "a mapping of names to text, such as {a: b}"),
        ("data.chat_template_kwargs=none", "a mapping of names to values, such as {a: true, b: text}"),
        ("data.chat_template_kwargs={a: [b]}", "a mapping of names to values, such as {a: true, b: text}"),
        ("data.prompt_column=[question", "a list of strings"),
        ("data.prompt_column={a: b}", "a list of strings"),
    ],
)
def test_wrong_type_names_key_value_and_expectation(override, expected):
    text = message(None, override)
    key, _, value = override.partition("=")
    assert f"{key} = {value} (command line): must be " in text
    assert expected in text


def test_a_value_that_is_empty_is_called_so_and_not_null(tmp_path):
    """As after run.name=$NAME with a variable that is not set."""
    text = message(write(tmp_path, "train:\n  lr:\n"), "run.name=", "run.steps= ")
    assert "run.name (command line): the value is empty; give text, or leave the key out for its default" in text
    assert "run.steps (command line): the value is empty; give a whole number, or" in text
    assert f"train.lr ({tmp_path}/job.yaml:2): the value is empty; give a finite number, or" in text
    assert "null" not in text
    assert "run.name = null (command line): must be text" in message(None, "run.name=null")


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("rollout.temprature=1", "rollout.temperature"),
        ("rollout.promts=1", "rollout.prompts_per_step"),
        ("rollout.lr=1", "train.lr"),
        ("rolout.top_p=1", "rollout.top_p"),
        ("optim.lr=1", "train.lr"),
        ("lr=1", "train.lr"),
        ("trian=1", "train"),
        ("train.every=1", "eval.every or checkpoint.every"),
        ("train.megatrom.moe_permute_fusion=true", "train.megatron"),
        ("train.moe_permute_fusion=true", "train.megatron.moe_permute_fusion"),
    ],
)
def test_unknown_key_suggests_the_nearest(override, suggestion):
    assert f"did you mean {suggestion}?" in message(None, override)


def test_five_mistakes_are_told_in_one_message_with_their_sources(tmp_path):
    path = write(
        tmp_path,
        "run:\n  steps: many\nrollout:\n  prompts_per_step: 10\n  temprature: 1\ntrain:\n  lr: 1e-3\n  min_lr: 5e-3\n",
    )
    text = message(path, "rollout.top_p=1.5")
    lines = text.splitlines()
    assert lines[0] == "invalid configuration, 5 problems:"
    assert len(lines) == 6
    assert f"run.steps = many ({path}:2): must be a whole number" in text
    assert f"rollout.temprature ({path}:5): unknown key; did you mean rollout.temperature?" in text
    assert f"rollout.prompts_per_step = 10 ({path}:4), train.minibatches = 4 (default): " in text
    assert f"train.min_lr = 0.005 ({path}:8), train.lr = 0.001 ({path}:7): " in text
    assert "rollout.top_p = 1.5 (command line): " in text


def test_a_value_from_the_preset_is_named_as_such():
    assert "objective.eps_max = 0.4 (preset etr)" in message(None, "objective.eps_high=0.5")


def test_an_override_mends_a_bad_value_of_the_file(tmp_path):
    assert load_config(write(tmp_path, "run:\n  steps: many\n"), ["run.steps=3"]).run.steps == 3


def test_a_key_of_wrong_type_causes_no_second_complaint_about_its_default(tmp_path):
    text = message(write(tmp_path, "train:\n  lr: fast\n  min_lr: 1.0\n"))
    assert text.splitlines()[0] == "invalid configuration, 1 problem:"


@pytest.mark.parametrize(
    "override",
    ["model.path=", "model.pth=models/large", "modell.path=models/large", "model=models/large", "path=models/large"],
)
def test_a_key_that_could_not_be_read_causes_no_complaint_that_depends_on_it(tmp_path, override):
    """The tiny model, which is the default, would have too few layers and too short a context for these settings."""
    text = "parallel:\n  pp: 4\nrollout:\n  max_response_tokens: 8192\n"
    assert "problem:\n" in message(write(tmp_path, text), override)
    assert "invalid configuration, 3 problems:" in message(write(tmp_path, text), "train.lrr=1")


def test_a_preset_that_is_none_causes_no_complaint_about_what_another_would_have_given():
    assert "3 problems" in message(None, "objective.eps_low=0.9", "objective.eps_high=0.9", "train.lrr=1")
    text = message(
        None, "objective.preset=no_such", "objective.eps_low=0.9", "objective.correction_floor=9", "train.minibatches=0"
    )
    assert "3 problems" in text and "eps_max" not in text and "objective.correction_floor = 9.0" in text


def test_of_a_file_that_cannot_be_read_no_key_is_known_but_those_of_the_command_line(tmp_path):
    text = message(tmp_path / "none.yaml", "parallel.pp=4", "rollout.top_p=2", "train.min_lr=1", "train.lr=0.1")
    assert "3 problems" in text and "cannot be read" in text and "rollout.top_p = 2" in text and "train.min_lr = 1" in text


def test_a_section_that_is_none_causes_no_complaint_about_its_defaults(tmp_path):
    assert "1 problem:" in message(write(tmp_path, "model: large\nparallel:\n  pp: 4\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run:\n  steps: 1\n bad: [\n", ":3: not valid YAML"),
        ("run:\n\tsteps: 1\n", ":2: not valid YAML"),
        ("- a\n- b\n", ":1: must be a mapping of sections"),
        ("{" * 1000, ": not valid YAML, maximum recursion depth exceeded"),
        ("run:\n  name: a\0b\n", ": not valid YAML, unacceptable character #x0000: special characters are not allowed"),
        (f"run:\n  steps: {'9' * 5000}\n", "must be a whole number"),
        ("run: 5\n", "run ("),
        ("run:\n  steps: 1\n  steps: 2\n", "run.steps ("),
        ("modell:\n  path: x\n", "did you mean model?"),
    ],
)
def test_broken_file_is_told_with_its_line(tmp_path, text, expected):
    path = write(tmp_path, text)
    found = message(path)
    assert str(path) in found
    assert expected in found


def test_key_given_twice_names_both_lines(tmp_path):
    path = write(tmp_path, "run:\n  steps: 1\n  steps: 2\n")
    assert f"run.steps ({path}:3): given twice, first at {path}:2" in message(path)


def test_several_held_out_sets_of_a_file_may_stand_one_a_line(tmp_path):
    assert load_config(write(tmp_path, "data:\n  eval:\n    a: b.jsonl\n    c: d\n")).data.eval == {"a": "b.jsonl", "c": "d"}
    told = message(write(tmp_path, "data:\n  eval:\n    a: b.jsonl\n    a: d\n"))
    assert told.endswith("must be a mapping of names to text, such as {a: b}, each name once")


def test_missing_file_directory_and_binary_are_user_errors(tmp_path):
    assert "No such file" in message(tmp_path / "none.yaml")
    assert "directory" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(tmp_path / "binary.yaml")


def test_dumped_yaml_loads_to_an_equal_config(tmp_path):
    config = replace(
        resolve(Config(), 2, cuda=False),
        objective=ObjectiveConfig(preset="etr_second_order", micro="none", kl_coef=1e-7),
        data=replace(Config().data, prompt_template='Q: "{prompt}"\nA: ✓', eval={"a": "b.jsonl"}, prompt_column=("p", "q")),
        run=replace(Config().run, name="null", dir="2024"),
    )
    assert load_config(write(tmp_path, dump_yaml(config))) == config
    assert to_dict(config)["reward"]["extract"] == ["boxed", "hash", "last_number"]


def test_config_is_importable_without_torch():
    code = "import sys, etr_megatron.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
