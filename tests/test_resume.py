"""How a run takes up its newest checkpoint: all ranks the same one, and SIGTERM meanwhile."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist

from etr_megatron import trainer as module
from etr_megatron.config import load_config
from etr_megatron.errors import RequeueError
from etr_megatron.platform.phases import Phases
from etr_megatron.platform.preemption import StopRequest


def trainer_without_parts() -> tuple[Any, list[int]]:
    """(a trainer that only keeps account of its steps, the steps that it saves)."""
    trainer: Any = object.__new__(module.Trainer)
    saved: list[int] = []
    trainer.config, trainer.policy, trainer.step = load_config(None, []), None, 0
    trainer.sampler = SimpleNamespace(load_state_dict=lambda state: None)
    trainer._directory = SimpleNamespace(checkpoints=None)
    trainer._stop_request = StopRequest()
    trainer._phases = Phases(60, must_stop=trainer._stop_request)
    trainer._open_recorder = trainer._unrecorded = None
    trainer._save = lambda: saved.append(trainer.step)
    trainer._run_steps = lambda: saved.append(-1)
    return trainer, saved


def resumed_and_stopped() -> tuple[int, list[int]]:
    """(the step that a resume takes up, the steps that a stop right after it saves) where rank 1 does not see step 7 yet."""
    trainer, saved = trainer_without_parts()
    seen = SimpleNamespace(latest_step=lambda folder: 7 - dist.get_rank(), load=lambda folder, step, policy: {})
    with mock.patch.object(module, "checkpoint", seen):
        trainer._resume()
        trainer._save_what_is_trained()
    return trainer.step, saved


def test_a_node_that_does_not_see_the_newest_checkpoint_yet_takes_it_up_all_the_same(gangs):
    assert gangs(2).run("tests.test_resume:resumed_and_stopped") == [(7, []), (7, [])]


def told_to_stop_while_loading() -> tuple[str, list[int]]:
    """(what a run says, what it saves) where rank 1 gets SIGTERM while the checkpoint of step 7 is read."""
    trainer, saved = trainer_without_parts()

    def load(folder: Any, step: int, policy: Any) -> dict[str, Any]:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while not trainer._stop_request():
                pass
        return {}

    with mock.patch.object(module, "checkpoint", SimpleNamespace(latest_step=lambda folder: 7, load=load)):
        try:
            with trainer._stop_request.on_sigterm(60):
                trainer.run()
        except RequeueError as error:
            return str(error), saved
    return "", saved


def test_sigterm_while_a_checkpoint_is_read_asks_to_be_started_again_and_saves_nothing(gangs):
    said = "told to stop (SIGTERM) before the resume: start again with the same command to go on"
    assert gangs(2).run("tests.test_resume:told_to_stop_while_loading") == [(said, []), (said, [])]
