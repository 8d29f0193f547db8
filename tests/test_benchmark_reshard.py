"""The resharding benchmark: its lower bound, its verdicts, and one whole run of a tiny case."""

from __future__ import annotations

import json

import pytest

from benchmarks import fresh_ranks, reshard
from benchmarks.reshard_problem import CASES, QUICK_DENSE, QUICK_MIXTURE, Case, lower_bound
from benchmarks.reshard_report import case_result, table
from etr_megatron.weights import ServerLayout, TrainingLayout
from etr_megatron.weights.reshard import make_reshard_plan
from tests import warm
from tests.test_reshard_plan import bytes_sent


def test_the_lower_bound_of_layouts_that_are_easy_to_count():
    dense = sum([2 * 1000 * 128, 128, 2 * (2 * 128 + 2 * 64 + (2 * 256 + 2 * 128) * 128 + 3 * 128 * 256)])
    apart = Case("", TrainingLayout(tp=2), ServerLayout(), together=False)
    assert lower_bound(apart, QUICK_DENSE, 2) == 2 * dense
    # Each of two ranks lacks half of every matrix. Both have the norms, and vocabulary padding does not count.
    norms = 128 + 2 * (2 * 128 + 2 * 64)
    together = Case("", TrainingLayout(tp=2), TrainingLayout(dp=2), together=True)
    assert lower_bound(together, QUICK_DENSE, 4) == 4 * (dense - norms)
    same = Case("", TrainingLayout(tp=2), TrainingLayout(tp=2), together=True)
    assert lower_bound(same, QUICK_DENSE, 4) == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans_of_all_cases_send_the_lower_bound(case):
    arch = QUICK_MIXTURE if case.experts else QUICK_DENSE
    plan = make_reshard_plan(case.source, case.destination, arch, destination_start=case.start)
    assert bytes_sent(plan) == lower_bound(case, arch, 2) > 0


def test_misses_are_called_misses():
    seconds = {"sharded": [0.5, 0.7, 9.0], "megatron_core": [1.0, 1.0, 1.0], "bare_copy": [0.2, 0.2, 0.3]}
    ranks = [{"seconds": seconds, "first_s": dict.fromkeys(seconds, 1.0), "bytes": dict.fromkeys(seconds, 60)}] * 2
    result = case_result("a case", 100, ranks)
    assert [(target["text"], round(target["value"], 3), target["met"]) for target in result["targets"]] == [
        ("bytes / lower bound", 1.2, False),
        ("time / megatron_core", 0.7, True),
        ("time / bare_copy", 3.5, False),
    ]
    assert "missed: sharded time / bare_copy = 3.500" in table(result)


@pytest.mark.slow
def test_a_tiny_case_runs_and_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh_ranks, "subprocess", warm.Subprocess)
    output = tmp_path / "result.json"
    assert reshard.main(["--quick", "--rounds", "2", "--case", "4", "--output", str(output)]) == 0
    (case,) = json.loads(output.read_text())["cases"]
    assert case["case"] == "TP2 -> server TP1"
    assert case["contestants"].keys() == {"sharded", "broadcast", "gather_broadcast", "bare_copy"}
    assert case["contestants"]["sharded"]["bytes_over_bound"] == 1.0
    assert case["contestants"]["broadcast"]["bytes_over_bound"] > 1.4


def test_wrong_options_are_one_sentence(tmp_path, capsys):
    assert reshard.main(["--rounds", "0", "--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "--rounds is 0; it must be at least 1\n"
    assert reshard.main(["--output", str(tmp_path / ("x" * 300))]) == 2
