"""A run can be inspected from anywhere: relative paths in its config are resolved from where the job was started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from etr_megatron import data
from etr_megatron.config import Config, ModelConfig, RunConfig, dump_yaml, path_of_run
from etr_megatron.convert import Ranks, to_megatron
from etr_megatron.data import load_tokenizer, tiny_policy_path
from etr_megatron.observe.__main__ import main as observe
from etr_megatron.observe.rollout_view import tokenizer_pieces
from etr_megatron.rollout.record import write_record
from etr_megatron.types import Group, Problem, Sample
from tests.test_convert_failures import refusal
from tests.test_data_sources import byte_tokenizer
from tools.convert_hf import main


@pytest.mark.parametrize(
    ("directory", "run", "found"),
    [
        ("runs", "start/runs/a", "start/model"),
        ("out/runs", "start/out/runs/a", "start/model"),
        ("runs", "start/other/a", "model"),  # renamed or moved: the start directory is unknown
        ("runs", "elsewhere/runs/a", "model"),  # copied to where there is no such path
        ("../runs", "start/runs/a", "model"),
    ],
)
def test_a_relative_path_is_looked_for_where_the_job_was_started(tmp_path, monkeypatch, directory, run, found):
    (tmp_path / "start" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = Config(run=RunConfig(dir=directory, name="a"))
    wanted = tmp_path / found if found.startswith("start") else Path(found)
    assert path_of_run("model", tmp_path / run, config) == path_of_run("model", Path(run), config) == wanted
    assert path_of_run("/model", tmp_path / run, config) == Path("/model")


def test_a_run_directory_that_is_a_link_is_where_the_link_is(tmp_path):
    (tmp_path / "start" / "model").mkdir(parents=True)
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "start" / "runs").symlink_to(tmp_path / "disk")
    config = Config(run=RunConfig(name="a"))
    assert path_of_run("model", tmp_path / "start" / "runs" / "a", config) == tmp_path / "start" / "model"


@pytest.fixture(params=["model", "tiny"])
def run(request, hf_models, tmp_path, monkeypatch):
    """A run with a checkpoint, started in another directory, from `model` or from the generated policy there."""
    start = tmp_path / "start"
    config = Config(run=RunConfig(name="a"), model=ModelConfig(path=request.param))
    model = start / (tiny_policy_path(config.tiny, config.arithmetic) if request.param == "tiny" else "model")
    shutil.copytree(hf_models["qwen3"], model)
    byte_tokenizer().save_pretrained(model)
    run = start / "runs" / "a"
    to_megatron(model, run / "checkpoints" / "step_000001", Ranks())
    for file in (run / "checkpoints" / "step_000001").glob("*.json"):
        if file.name != "metadata.json":
            file.unlink()  # as a run leaves it
    (run / "config.yaml").write_text(dump_yaml(config))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(data, "build_tiny_policy", lambda *_, **__: pytest.fail("made anew"))
    return run


def test_a_run_is_converted_and_read_from_another_directory(run, capsys):
    assert main(["to-hf", "--megatron", str(run), "--out", "out"]) == 0
    assert json.loads(Path("out/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert load_tokenizer("out").encode("12") == byte_tokenizer().encode("12")
    assert [path.name for path in Path().iterdir()] == ["out"]
    pieces = tokenizer_pieces(run)
    assert not isinstance(pieces, str) and "".join(pieces(byte_tokenizer().encode("12+7="))) == "12+7="


def test_a_rollout_whose_tokenizer_is_gone_is_shown_by_ids_and_says_what_is_missing(run, capsys):
    sample = Sample(0, [5, 6], [-0.1, -0.5], "stop", 4, "x", 1.0, "ok")
    write_record(run / "recorded", 1, [Group("a@1", Problem("a", "?", "1", [1]), [sample])], {}, None)
    (model,) = (file.parent for file in run.parents[1].rglob("tokenizer.json"))
    command = ["rollout", str(run), "--step", "1", "--sample", "a@1/0"]
    assert observe(command) == 0 and "without text" not in capsys.readouterr().out
    (model / "tokenizer.json").write_text("{")
    assert observe(command) == 0
    assert f"tokens are shown without text: model.path: the tokenizer in '{model}' cannot be loaded" in capsys.readouterr().out
    shutil.rmtree(model)
    assert observe(command) == 0
    said = capsys.readouterr().out
    assert "tokens are shown without text: the run's model.path, " in said and ", no longer exists\n" in said
    assert model.name in said and said.splitlines()[-1].split()[:2] == ["1", "6"]
    (run / "config.yaml").unlink()
    assert observe(command) == 0 and "config.yaml cannot be read: No such file" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["model"], indirect=True)
def test_a_model_that_is_nowhere_is_asked_for(run, capsys):
    shutil.rmtree(run.parents[1] / "model")
    said = refusal(capsys, "to-hf", "--megatron", run, "--out", "out")
    assert "the run started from model, which does not exist; give the model's HuggingFace directory with --config-from" in said
