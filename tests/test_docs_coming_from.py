"""docs/coming_from.md: our column names keys, options and scripts that exist, and its examples load and fit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from etr_megatron.cli import USAGE
from etr_megatron.config import Config, fill_objective, load_config, to_dict
from etr_megatron.planner import make_plan
from tests.runs import REPO

PAGE = (REPO / "docs" / "coming_from.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
OURS = [name for row in ROWS if len(row) == 4 for name in re.findall(r"`([^`]+)`", row[0])]
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
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
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    verls = ModuleType("my_rewards")
    verls.compute_score = lambda data_source, solution_str, ground_truth, extra_info: {
        "score": float(solution_str == ground_truth) + (data_source == "a") + extra_info["more"],
        "acc": solution_str == ground_truth,
    }
    monkeypatch.setitem(sys.modules, "my_rewards", verls)
    names: dict = {}
    exec(code[1], names)
    columns = {"data_source": "a", "extra_info": {"more": 5}}
    assert names["score"]("1+1?", "2", "2", columns) == {"score": 7.0, "acc": True}
