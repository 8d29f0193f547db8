"""The command line of the launcher: arguments, the default config and number of processes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from etr_megatron import cli
from etr_megatron.cli import default_config, last_of_each, parse_args
from etr_megatron.config import Config, ParallelConfig, RolloutConfig, SglangConfig
from etr_megatron.errors import UserError
from etr_megatron.launch import default_nproc, main
from tests.runs import REPO


def test_config_and_overrides_come_in_any_order() -> None:
    expected = (Path("a.yaml"), ["run.seed=3", "data.train=x=y.jsonl"])
    for line in (
        "a.yaml run.seed=3 data.train=x=y.jsonl",
        "run.seed=3 a.yaml data.train=x=y.jsonl",
        "--config a.yaml run.seed=3 data.train=x=y.jsonl",
        "run.seed=3 data.train=x=y.jsonl --config=a.yaml",
    ):
        assert parse_args(line.split()) == expected


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("a.yaml b.yaml", "two configs are given, a.yaml and b.yaml"),
        ("--config a.yaml b.yaml", "two configs are given"),
        ("a.yaml --fast", "unknown option --fast"),
        ("--config", "--config must be followed by a config file"),
        ("--config ''", "--config must be followed by a config file"),
        ("--config=", "an argument is empty"),
        ("a.yaml ''", "an argument is empty"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(line: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(shlex.split(line))
    assert part in str(caught.value)


def test_of_overrides_the_order_of_the_last_ones_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """A mapping replaces entries that were given before it, and not those after it."""
    assert last_of_each(["m.a=1", "x=1", "m={b: 2}", "m.a=3", "x=1"]) == ["m={b: 2}", "m.a=3", "x=1"]
    assert "no effect" not in capsys.readouterr().err
    last_of_each(["s.m.a=1", "s.m={b: 2}", "s.m.b=3", "s.max=4"])
    assert capsys.readouterr().err == "note: s.m.a on the command line has no effect: s.m={b: 2} comes after it\n"


def test_the_launchers_usage_has_all_of_its_options_wherever_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["[--nproc N]", "[--rollout-only | --dry-run]"]
    assert main(["--help"]) == 0 and main(["--fast"]) == 2
    told = capsys.readouterr()
    script = (REPO / "examples" / "run_etr.sh").read_text().splitlines()
    (line,) = [line for line in script if line.startswith("#   bash examples/run_etr.sh")]
    for shown in (told.out, told.err, line):
        assert [option for option in options if option not in shown] == []
    assert "unknown option --fast" in told.err


def shipped_configs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "cpu_tiny.yaml").write_text("# A small job.\nrun:\n  seed: 1\n")
    (folder / "big.yaml").write_text("# A big job.\n")
    monkeypatch.setattr(cli, "CONFIGS", folder)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("tools/plan.py", "--gpus", "8", "--config", ""), "--config"),
        (("tools/convert_hf.py", "to-megatron", "--hf", "", "--out", "out"), "--hf"),
        (("tools/convert_hf.py", "to-hf", "--megatron", "run", "--out="), "--out"),
        (("-m", "etr_megatron.observe", ""), "RUN_DIR"),
        (("-m", "etr_megatron.observe", "runs/a", "--png", ""), "--png"),
    ],
)
def test_a_path_that_is_empty_is_not_taken_for_the_working_directory(command: tuple[str, ...], option: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"argument {option}: it is empty, perhaps because a variable is not set" in done.stderr


def test_without_a_config_cpu_runs_the_small_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped_configs(monkeypatch, tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert parse_args(["run.seed=3"]) == (tmp_path / "cpu_tiny.yaml", ["run.seed=3"])


def test_without_a_config_cuda_stops_and_lists_the_shipped_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped_configs(monkeypatch, tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError) as caught:
        parse_args(["run.seed=3"])
    assert [" ".join(line.split()) for line in str(caught.value).splitlines()[1:]] == [
        f"{tmp_path}/big.yaml A big job.",
        f"{tmp_path}/cpu_tiny.yaml A small job.",
    ]
    assert parse_args(["run.platform=cpu"]) == (tmp_path / "cpu_tiny.yaml", ["run.platform=cpu"])


def test_a_default_config_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "CONFIGS", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/cpu_tiny.yaml does not exist"):
        default_config(cuda=False)


@pytest.mark.parametrize(
    ("parallel", "cores", "gpus", "nproc"),
    [
        (ParallelConfig(), 16, 0, 2),
        (ParallelConfig(), 1, 0, 1),
        (ParallelConfig(pp=3), 16, 0, 3),
        (ParallelConfig(tp=1), 16, 0, 1),
        (ParallelConfig(tp=2, pp=3), 1, 0, 6),
        (ParallelConfig(tp=2), 16, 8, 8),
    ],
)
def test_default_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig, cores: int, gpus: int, nproc: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert default_nproc(Config(parallel=parallel), gpus) == nproc


@pytest.mark.parametrize(
    ("servers", "nproc"),
    [
        (SglangConfig(servers=2, tp=2), 4),
        (SglangConfig(servers=2, tp=2, placement="colocated"), 8),
        (SglangConfig(urls=("http://a:1",), tp=2), 8),
        (SglangConfig(tp=8), 1),  # reported when the servers look for their GPUs
    ],
    ids=["dedicated", "colocated", "external", "all taken"],
)
def test_dedicated_servers_keep_their_gpus_from_the_ranks(servers: SglangConfig, nproc: int) -> None:
    assert default_nproc(Config(rollout=RolloutConfig(backend="sglang"), sglang=servers), 8) == nproc
    assert default_nproc(Config(sglang=servers), 8) == 8  # the embedded backend has no servers
