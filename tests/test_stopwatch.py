from __future__ import annotations

import time

import pytest

from etr_megatron.observe import Stopwatch


def test_stopwatch_adds_up_phases_and_restarts_at_each_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    for phase, seconds in (("rollout", 3.0), ("reward", 1.5), ("rollout", 0.25), ("sync", 2.0)):
        with watch.phase(phase):  # type: ignore[arg-type]
            now[0] += seconds
        now[0] += 0.5
    expected = {"time_rollout": 3.25, "time_reward": 1.5, "time_train": 0.0, "time_sync": 2.0, "time_step": 8.75}
    assert watch.lap() == expected
    now[0] += 4.0
    assert watch.lap() == dict.fromkeys(expected, 0.0) | {"time_step": 4.0}


def test_parts_of_a_phase_are_in_its_time_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    with watch.phase("train"):
        for part, seconds in (("logprobs", 2.0), ("update", 1.0), ("update", 4.0)):
            with watch.part(part):  # type: ignore[arg-type]
                now[0] += seconds
            now[0] += 0.5
    times = watch.lap()
    assert (times["time_train"], times["time_logprobs"], times["time_update"]) == (8.5, 2.0, 5.0)
    assert "time_reference" not in times and "time_update" not in watch.lap()


def test_stopwatch_phases_do_not_nest_and_count_when_they_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    with pytest.raises(RuntimeError, match="'reward' inside phase 'train'"), watch.phase("train"):
        now[0] += 2.0
        with watch.phase("reward"):
            pass
    assert watch.lap()["time_train"] == 2.0
