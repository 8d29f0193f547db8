"""docs/coming_from.md: our column names keys, options and scripts that exist, and its examples load and fit."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from etr_megatron.cli import USAGE
from etr_megatron.config import Config, EnvironmentConfig, fill_objective, load_config, to_dict
from etr_megatron.environment import load_environment
from etr_megatron.planner import make_plan
from tests.environments import ask, said
from tests.runs import REPO

PAGE = (REPO / "docs" / "coming_from.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
OURS = [name for row in ROWS if len(row) == 4 for name in re.findall(r"`([^`]+)`", row[0])]
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
REWARD, *ENVIRONMENTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
KEYS = {f"{section}.{key}" for section, keys in to_dict(Config()).items() for key in keys}


def is_ours(name: str) -> bool:
    if name.startswith("--"):
        return name in USAGE
    if "/" in name:
        return (REPO / name).is_file()
    return name.split(":")[0] in KEYS


def test_every_name_in_our_column_exists():
    named = [name for name in OURS if "." in name or name.startswith("--")]
    assert len(named) > 100
    assert [name for name in named if not is_ours(name)] == []


def test_a_value_in_our_column_is_accepted(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("{}")
    values = [name.replace(": ", "=") for name in OURS if re.fullmatch(r"objective\.\w+: \w+", name)]
    assert "objective.correction=mask" in values
    for value in values:
        load_config(tmp_path / "config.yaml", ["objective.preset=dr_grpo", value])


def test_every_row_has_the_cells_of_its_table():
    assert [row for row in ROWS if len(row) not in (2, 4)] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=["verl", "slime"])
def test_an_example_loads_and_fits_on_8_gpus(example: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(example)
    assert make_plan(load_config(tmp_path / "config.yaml"), 8).fits


def test_the_examples_have_the_numbers_of_their_command_lines(tmp_path: Path):
    configs = []
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"{number}.yaml").write_text(example)
        configs.append(load_config(tmp_path / f"{number}.yaml"))
    verl, slime = configs
    assert verl.rollout.prompts_per_step / verl.train.minibatches == 32
    assert verl.train.lr_warmup_updates == 10 * verl.train.minibatches
    assert slime.rollout.prompts_per_step * slime.rollout.samples_per_prompt / slime.train.minibatches == 256
    for config in configs:
        filled = fill_objective(config.objective)
        assert (filled.eps_low, filled.eps_high) == (0.2, 0.28)


def test_the_reward_function_for_verl_works(monkeypatch: pytest.MonkeyPatch):
    verls = ModuleType("my_rewards")
    verls.compute_score = lambda data_source, solution_str, ground_truth, extra_info: {
        "score": float(solution_str == ground_truth) + (data_source == "a") + extra_info["more"],
        "acc": solution_str == ground_truth,
    }
    monkeypatch.setitem(sys.modules, "my_rewards", verls)
    names: dict = {}
    exec(REWARD, names)
    columns = {"data_source": "a", "extra_info": {"more": 5}}
    assert names["score"]("1+1?", "2", "2", columns) == {"score": 7.0, "acc": True}


MY_TOOLS = """
import types

class Tool:
    opened = 0

    async def create(self, instance_id=None, **kwargs):
        Tool.opened += 1
        return kwargs["create_kwargs"].get("said", "nothing"), None

    async def execute(self, instance_id, parameters):
        if parameters["times"] < 0:
            raise ValueError("negative")
        return types.SimpleNamespace(text=instance_id * parameters["times"]), 0.5, {}

    async def release(self, instance_id):
        Tool.opened -= 1

TOOLS = {"say": Tool()}
"""
MY_SEARCH = """
async def execute_predictions(prediction):
    return ("", True) if "<answer>" in prediction else (f"<information>{prediction[8:-9]}</information>", False)
"""


@pytest.fixture
def environment_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A function of the page beside a module that it imports, loaded as in a run."""

    def load(function: str, name: str, module: str):
        (tmp_path / f"{name}.py").write_text(module)
        (tmp_path / "my_environment.py").write_text(function)
        monkeypatch.syspath_prepend(tmp_path)
        for imported in (name, "my_environment"):
            sys.modules.pop(imported, None)
        environment = load_environment(EnvironmentConfig(function="my_environment:reply"))
        return lambda request: asyncio.run(environment(request))

    yield load
    for imported in ("my_tools", "my_search", "my_environment"):
        sys.modules.pop(imported, None)  # other tests have modules of these names


def test_tools_of_verl_answer_as_there(environment_of):
    def call(name: str, times: int) -> str:
        return f"<tool_call>{json.dumps({'name': name, 'arguments': {'times': times}})}</tool_call>"

    def reply(content: str, kwargs: dict | None = None):
        return environment(ask(content, **{"extra_info.tools_kwargs": kwargs}))

    environment = environment_of(ENVIRONMENTS[0], "my_tools", MY_TOOLS)
    assert reply("It is 4.").messages is None
    assert reply(f"Hm. {call('say', 2)}{call('say', 3)}") == said("nothingnothing", role="tool")
    assert reply(call("say", 2), {"say": {"create_kwargs": {"said": "a"}}, "hear": None}) == said("aa", role="tool")
    assert reply(call("say", 1), {"say": None}) == said("nothing", role="tool")
    long = "nothing" * 100
    assert reply(call("say", 100)) == said(f"{long[:128]}...(truncated)...{long[-128:]}", role="tool")
    assert reply(call("say", -1)) == said("Error when executing tool: negative", role="tool")
    assert reply(call("sing", 1)) == said("Error when executing tool: 'sing'", role="tool")
    assert reply("<tool_call>say!</tool_call>").messages[0]["content"].startswith("Error when executing tool: ")
    assert sys.modules["my_tools"].Tool.opened == 0


def test_a_generate_function_of_slime_leaves_what_answers_the_model(environment_of):
    environment = environment_of(ENVIRONMENTS[1], "my_search", MY_SEARCH)
    assert environment(ask("<search>cats</search>")) == said("<information>cats</information>")
    assert environment(ask("<answer>4</answer>")).messages is None


def test_the_overrides_for_tools_are_accepted(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("data: {train: mine.jsonl, eval: null}")
    blocks = re.findall(r"```bash\n(environment\..*?)```", PAGE, re.DOTALL)
    verl, slime = (load_config(tmp_path / "config.yaml", shlex.split(block)) for block in blocks)
    assert verl.reward.columns == ("extra_info.tools_kwargs",) and verl.data.tools == "my_tools.json"
    assert slime.rollout.stop_strings == ("</search>", "</answer>") and slime.environment.max_turns == 2
