"""Which checkpoint a run is at is what rank 0 sees, whatever another node's view of the shared directory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist

import etr_megatron.policy  # noqa: F401  (its import makes megatron.core importable without a GPU)
from etr_megatron import trainer as module
from etr_megatron.config import load_config


def resumed_and_stopped() -> tuple[int, list[int]]:
    """(the step that a resume takes up, the steps that a stop right after it saves) where rank 1 does not see step 7 yet."""
    trainer: Any = object.__new__(module.Trainer)
    saved: list[int] = []
    trainer.config, trainer.policy, trainer.step = load_config(None, []), None, 0
    trainer.sampler = SimpleNamespace(load_state_dict=lambda state: None)
    trainer._directory = SimpleNamespace(checkpoints=None)
    trainer._phases = SimpleNamespace(meet=lambda phase: None)
    trainer._open_recorder = trainer._unrecorded = None
    trainer._save = lambda: saved.append(trainer.step)
    seen = SimpleNamespace(latest_step=lambda folder: 7 - dist.get_rank(), load=lambda folder, step, policy: {})
    with mock.patch.object(module, "checkpoint", seen):
        trainer._resume()
        trainer._save_what_is_trained()
    return trainer.step, saved


def test_a_node_that_does_not_see_the_newest_checkpoint_yet_takes_it_up_all_the_same(gangs):
    assert gangs(2).run("tests.test_checkpoint_agreement:resumed_and_stopped") == [(7, []), (7, [])]
