"""The rollout benchmark: equal work for both contestants, its verdicts, and a whole run without a real server."""

from __future__ import annotations

import json

import pytest

from benchmarks import rollout
from benchmarks.rollout_contestants import BareLoop, Shape, config_of, make_problems
from benchmarks.rollout_report import pair_result, pair_table, tail_result, tail_table
from benchmarks.rollout_server import Responses
from tests.runs import REPO

PYTHON = REPO / ".venv-sglang" / "bin" / "python"


def test_the_ratio_is_the_median_of_the_rounds_own_ratios():
    wall = {"sampler": [1.0, 4.0, 2.0], "bare_loop": [0.9, 4.4, 1.8]}  # the machine was busy in the second round
    cpu = {name: [0.3, 0.2, 0.5] for name in wall}
    found = pair_result("SGLang on CPU", Shape(3, 2, 10, 5), wall, cpu)
    assert found["ratio"] == {"bare_loop": pytest.approx(0.9)}
    assert found["contestants"]["sampler"]["tokens_per_s"] == pytest.approx(3 * 2 * 10 / 2.0)
    assert found["contestants"]["sampler"]["cpu_us_per_request"] == pytest.approx(50_000)
    assert not found["targets"][0]["met"] and "missed: at least 0.97" in pair_table(found)
    assert pair_result("SGLang", Shape(3, 2, 10), {**wall, "bare_loop": [0.98, 3.9, 1.96]}, cpu)["targets"][0]["met"]
    assert not pair_result("short", Shape(3, 2, 10), wall, cpu)["targets"]


def test_a_step_waits_for_its_groups_and_for_its_weight_sync():
    waits = {name: {"groups_s": [1.0, 2.0], "sync_s": [0.5, 0.5]} for name in ("partial, no tail", "one step ahead")}
    waits["partial"] = {"groups_s": [1.0, 2.0], "sync_s": [0.5, 2.5]}  # 3 s on average, 1 s more
    found = tail_result(waits, ordinary_s=0.5, share=0.01, factor=10)
    assert found["settings"]["partial"]["mean_s"] == 3.0
    (target,) = found["targets"]
    assert target["value"] == pytest.approx(0.2) and not target["met"] and "missed" in tail_table(found)


def test_both_contestants_send_the_same_requests_of_which_the_server_makes_one_in_a_hundred_long():
    shape = Shape(prompts=3, samples=2, tokens=7)
    config, problems = config_of(shape, "http://127.0.0.1:1"), make_problems(shape, 2, 11, 50)
    loop = BareLoop(config, problems)
    bodies = loop.bodies(2)
    loop.close()
    assert [body["input_ids"] for body in bodies] == [problem.prompt_ids.tolist() for problem in problems[3:] for _ in range(2)]
    responses = Responses(tokens=4, tail=40, tail_share=0.01)
    lengths = [responses.length(seed) for seed in range(20_000)]
    assert set(lengths) == {4, 40} and lengths.count(40) / len(lengths) == pytest.approx(0.01, abs=0.003)


@pytest.mark.slow
def test_a_quick_run_measures_the_client_and_the_tail_and_is_written(tmp_path):
    output = tmp_path / "new" / "result.json"
    parts = ["--part", "client", "--part", "tail", "--part", "replies"]
    options = ["--quick", "--rounds", "1", *parts, "--output", str(output)]
    assert rollout.main(options) == 0
    found = json.loads(output.read_text())
    (case,) = found["client"]["cases"]
    assert case["contestants"].keys() == {"sampler", "bare_loop", "bare_connections"}
    assert case["ratio"].keys() == {"bare_loop", "bare_connections"} and len(case["ratios"]["bare_loop"]) == 1
    assert found["tail"]["settings"]["partial"]["min_s"] >= 0 and "server" not in found
    assert [one["ratio"] > 0 for one in found["replies"]["cases"]] == [True, True]


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-sglang: `bash tools/setup_env.sh --sglang` makes it")
def test_a_quick_run_on_a_real_server_is_written(tmp_path):
    output = tmp_path / "result.json"
    assert rollout.main(["--quick", "--rounds", "1", "--part", "server", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["server"]["cases"][0]["ratio"].keys() == {"bare_loop", "bare_connections"}


def test_wrong_options_are_one_sentence(tmp_path, capsys):
    assert rollout.main(["--rounds", "0", "--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "--rounds is 0; it must be at least 1\n"
    assert rollout.main(["--part", "tail", "--output", "/dev/null/x.json"]) == 2
