"""The conversion benchmark: its figures, the commands that it measures, and a whole run on a tiny checkpoint."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import convert
from benchmarks.process_cost import Cost, cost_of
from tests import warm


def test_ratios_are_of_the_same_round_and_memory_is_that_of_the_worst():
    rounds = [
        {"cp": Cost(10.0, 5), "cp_fsync": Cost(20.0, 5), "convert": Cost(10.0, 70)},
        {"cp": Cost(1.0, 5), "cp_fsync": Cost(4.0, 5), "convert": Cost(3.0, 120)},
        {"cp": Cost(4.0, 5), "cp_fsync": Cost(5.0, 5), "convert": Cost(8.0, 60)},
    ]
    found = convert.summary(rounds, bound=100)
    assert found["ratios"] == {"cp": [1.0, 3.0, 2.0], "cp_fsync": [0.5, 0.75, 1.6]}
    assert (found["times_cp"], found["times_cp_fsync"]) == (2.0, 0.75)
    assert found["median_seconds"] == {"cp": 4.0, "cp_fsync": 5.0, "convert": 8.0}
    assert found["peak_resident_bytes"] == 120 and not found["memory_within_bound"]
    assert convert.summary(rounds, bound=120)["memory_within_bound"]


def test_the_peak_of_a_command_is_its_own_and_not_that_of_the_process_that_measures():
    held = bytearray(b"x") * 300_000_000
    assert cost_of([sys.executable, "-c", "pass"]).peak_resident_bytes < 100e6 < len(held)
    found = cost_of([sys.executable, "-c", "import time; held = bytearray(b'x') * 200_000_000; time.sleep(0.2)"])
    assert 200e6 < found.peak_resident_bytes < 300e6 and found.seconds > 0.2


def test_a_command_that_fails_ends_the_measurement():
    with pytest.raises(SystemExit, match=r"exit\(3\) ended with 3$"):
        cost_of([sys.executable, "-c", "exit(3)"])


@pytest.mark.slow
def test_a_small_checkpoint_is_converted_and_what_it_took_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "subprocess", warm.Subprocess)  # what is measured starts cold
    output = tmp_path / "result.json"
    asked = ["--layers", "1", "--rounds", "1", "--ways", "fp8_to_megatron", "--work", str(tmp_path)]
    assert convert.main([*asked, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["largest_tensor_bytes"] == 2 * 16384 * 2048 and found["memory_bound_bytes"] == 10**9 + 4 * 16384 * 2048
    assert found.keys() == {
        *("environment", "checkpoint_bytes", "largest_tensor_bytes", "memory_bound_bytes", "fp8_to_megatron")
    }
    way = found["fp8_to_megatron"]
    assert way["memory_within_bound"] and way["peak_resident_bytes"] > 50e6
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in way["seconds"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; it must be at least 1\n"),
        (["--layers", "0"], "--layers is 0; it must be at least 1\n"),
        (["--work", "/no/such/disk"], "--work /no/such/disk is no directory\n"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path, capsys, options, message):
    assert convert.main([*options, "--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == message and not any(tmp_path.iterdir())
