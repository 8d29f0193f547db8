"""How often a trainer has servers brought back that die while responses are drawn."""

from __future__ import annotations

from unittest import mock

from etr_megatron import trainer
from etr_megatron.config import Config
from etr_megatron.rollout import EngineGoneError, NeedsSyncError


def drawing(*failures: int) -> tuple[list[str], int]:
    """What as many draws as there are numbers return, each after so many times that servers died, and the number of syncs."""
    others = "policy", "sampler", "held_out", "decode", "directory", "grader", "recorder", "stop_request", "phases"
    engine = mock.Mock()
    one = trainer.Trainer(Config(), engine=engine, **dict.fromkeys(others, mock.MagicMock()))

    def draw(left: list[int]) -> str:
        if left:
            raise NeedsSyncError(f"server {left.pop()} died")
        return "drawn"

    found = []
    try:
        for count in failures:
            left = list(range(count))
            found.append(one._with_servers(lambda left=left: draw(left)))
    except EngineGoneError as error:
        found.append(str(error))
    return found, engine.update_weights.call_count


def test_servers_that_die_again_and_again_over_the_same_responses_end_the_run(monkeypatch):
    monkeypatch.setattr(trainer, "MAX_SERVER_RESTARTS", 3)
    assert drawing(3, 3, 2) == (["drawn"] * 3, 8)  # what is drawn counts anew
    (first, error), syncs = drawing(1, 9)
    assert first == "drawn" and syncs == 1 + 3
    assert error.startswith("server 5 died; servers were brought back 3 times for the same responses and died again each time")
