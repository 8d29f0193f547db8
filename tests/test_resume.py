"""Resuming from the newest checkpoint: all ranks load the same one, also if SIGTERM arrives meanwhile."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from etr_megatron import checkpoint
from etr_megatron import trainer as module
from etr_megatron.config import load_config
from etr_megatron.errors import RequeueError
from etr_megatron.platform.phases import PhaseBarriers
from etr_megatron.platform.preemption import StopRequest
from etr_megatron.rollout import OtherModelError, UngradedError
from etr_megatron.weights.transport import SyncError


def trainer_without_parts() -> tuple[Any, list[int]]:
    """(a trainer that only counts its steps, the steps that it saves)."""
    trainer: Any = object.__new__(module.Trainer)
    saved: list[int] = []
    trainer.config, trainer.policy, trainer.step = load_config(None, []), None, 0
    trainer.sampler = SimpleNamespace(load_state_dict=lambda state: None)
    trainer._directory = SimpleNamespace(checkpoints=None)
    trainer._stop_request = StopRequest()
    trainer._phases = PhaseBarriers(60, must_stop=trainer._stop_request)
    trainer._saver = checkpoint.Saver(trainer.config, trainer._phases)
    trainer._open_recorder = trainer._unrecorded = None
    trainer.has_begun = False
    trainer._save = lambda: saved.append(trainer.step)
    trainer._run_steps = lambda: saved.append(-1)
    return trainer, saved


def resumed_and_stopped() -> tuple[int, list[int], list[bool]]:
    """(the step that a resume loads, the steps that a stop right after it saves, whether the run has begun while the checkpoint
    is loaded and after the resume) when rank 1 does not see step 7 yet."""
    trainer, saved = trainer_without_parts()
    begun: list[bool] = []

    def load(folder: Any, step: int, policy: Any) -> dict[str, Any]:
        begun.append(trainer.has_begun)
        return {}

    seen = SimpleNamespace(latest_step=lambda folder: 7 - dist.get_rank(), load=load)
    with mock.patch.object(module, "checkpoint", seen):
        trainer._resume()
        trainer._save_trained_state()
    return trainer.step, saved, [*begun, trainer.has_begun]


def test_a_node_that_does_not_see_the_newest_checkpoint_yet_takes_it_up_all_the_same(gangs):
    assert gangs(2).run("tests.test_resume:resumed_and_stopped") == [(7, [], [False, True])] * 2


def told_to_stop_while_loading() -> tuple[str, list[int]]:
    """(the run's message, the steps that it saves) when rank 1 gets SIGTERM while the checkpoint of step 7 is read."""
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
    said = "told to stop (SIGTERM) before the resume: start again with the same command to continue"
    assert gangs(2).run("tests.test_resume:told_to_stop_while_loading") == [(said, []), (said, [])]


def stopped_by(error: Exception, trained: int, *, lost: bool = False) -> tuple[str, list[int]]:
    """(the error that ends the run, the steps that it saves) when every rank, or with `lost` all but rank 1, raises
    `error` after `trained` steps."""
    trainer, saved = trainer_without_parts()
    trainer._resume = lambda: None

    def steps() -> None:
        trainer.step = trainer.trained = trained
        raise KeyboardInterrupt if lost and dist.get_rank() == 1 else error

    trainer._run_steps = steps
    with mock.patch.multiple(
        module, IDLE_BARRIER_TIMEOUT_S=1.0 if lost else 60.0, checkpoint=SimpleNamespace(latest_step=lambda folder: None)
    ):
        try:
            trainer.run()
        except type(error) as ended:
            return str(ended), saved
        except KeyboardInterrupt:
            time.sleep(2.0)  # it hangs
    return "", saved


@pytest.mark.parametrize("error", [SyncError("no server"), OtherModelError("all of them"), UngradedError("no rewards")])
def test_what_was_trained_is_saved_when_weights_or_rewards_do_not_arrive(gangs, error):
    assert gangs(2).run("tests.test_resume:stopped_by", error=error, trained=3) == [(str(error), [3])] * 2
    assert gangs(2).run("tests.test_resume:stopped_by", error=error, trained=0) == [(str(error), [])] * 2


def test_nobody_waits_to_save_for_a_rank_that_a_failed_weight_sync_has_lost(gangs):
    error = SyncError("rank 1 is missing")
    (said, saved), _ = gangs(2).run("tests.test_resume:stopped_by", error=error, trained=3, lost=True)
    assert (said, saved) == ("rank 1 is missing", [])
