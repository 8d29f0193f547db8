"""What a trainer still holds of a step when the next one begins."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from etr_megatron import trainer
from etr_megatron.config import Config
from etr_megatron.rollout import Rollouts


class Anything:
    """Supports weak references, which a list does not."""


def test_the_groups_and_the_batch_of_a_step_are_gone_before_the_next_ones_groups_come():
    """With routing replay, both hold the experts of every token: gigabytes on every rank."""
    config, seen, alive = Config(), [], []

    def take(*_: Any) -> Rollouts:
        alive.append([one() is not None for one in seen])
        group = Anything()
        seen.append(weakref.ref(group))
        return Rollouts([group])

    def train(_groups: list) -> tuple[Anything, list]:
        batch = Anything()
        seen.append(weakref.ref(batch))
        return batch, []

    stubs = dict.fromkeys(("policy", "decode", "directory", "stop_request", "phases"), mock.MagicMock())
    stubs |= {"engine": None, "grader": None, "recorder": None, "held_out": [], "sampler": mock.Mock(take=take)}
    run = replace(config.run, steps=3)
    one = trainer.Trainer(replace(config, run=run, checkpoint=replace(config.checkpoint, every=0)), **stubs)
    keep_nothing = mock.patch.multiple(one, _train=train, _write_record=lambda *_: None)
    with keep_nothing, mock.patch.object(trainer, "step_metrics", lambda *_: {}):
        one._run_steps()
    assert alive == [[], [False] * 2, [False] * 4]


def test_what_only_training_needs_leaves_the_gpu_before_servers_take_their_memory_back():
    done: list[str] = []
    others = "sampler", "held_out", "decode", "directory", "grader", "recorder", "stop_request", "phases"
    stubs = dict.fromkeys(others, mock.MagicMock())
    stubs["policy"] = mock.MagicMock(offload=lambda: done.append("offloaded"))
    engine = mock.Mock(update_weights=lambda *_args, **_options: done.append("taken back"))
    trainer.Trainer(Config(), engine=engine, **stubs)._sync()
    assert done == ["offloaded", "taken back"]


def test_ranks_take_their_memory_back_after_servers_have_released_it_and_before_they_train():
    done: list[str] = []

    class StopHereError(Exception):
        pass

    def logprobs(*_args: Any, **_options: Any) -> None:
        done.append("log-probs")
        raise StopHereError

    others = "policy", "held_out", "decode", "directory", "grader", "recorder", "stop_request", "phases"
    stubs = dict.fromkeys(others, mock.MagicMock())
    stubs["sampler"] = mock.Mock(cut_off=lambda: done.append("cut off"))
    stubs["policy"] = mock.MagicMock(reload=lambda: done.append("reloaded"), logprobs=logprobs, reference=None)
    engine = mock.Mock(release=lambda: done.append("released"))
    with pytest.raises(StopHereError):
        trainer.Trainer(Config(), engine=engine, **stubs)._train([])
    assert done == ["cut off", "released", "reloaded", "log-probs"]
