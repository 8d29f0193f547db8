"""Every algorithm's loss through the policy: the layout changes neither loss nor gradients, and a user's own loss trains."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

import etr_megatron
from etr_megatron.objective import LossInputs, LossOutputs, regularized, token_weights
from etr_megatron.policy import StepRouting
from tests.hf_models import random_sequences
from tests.policy_jobs import build, make_batch

PRESETS = ("etr", "dr_grpo", "gspo", "cispo", "rloo")
"""One preset per loss; the others differ from `etr` only in numbers that are computed before the policy runs."""
LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "dp2": (2, ["parallel.tp=1", "train.tokens_per_microbatch=60"]),
    # Ranks hold parts of the same sequences.
    "cp2": (2, ["parallel.tp=1", "parallel.cp=2", "train.tokens_per_microbatch=60"]),
}
# See tests/test_policy_training.py: with this epsilon the weights after an update show the gradients one to one.
BASE = ["train.lr=1", "train.adam_eps=1", "train.clip_grad=0", "objective.kl_coef=0.1", "objective.entropy_coef=0.01"]


def train(model: str, sequences: list, overrides: list[str]) -> dict[str, Any]:
    """Two updates on a batch with tokens and whole sequences on both sides of their bounds."""
    policy = build(model, overrides)
    objective = policy.config.objective
    batch = make_batch(sequences)
    old = policy.logprobs(batch.sequences)
    shift = torch.linspace(-0.4, 0.4, len(batch))
    lengths = [len(response) for _, response in sequences]
    batch = replace(
        batch,
        old_logp=tuple(a + s + 0.2 * (b - b.mean()) for a, b, s in zip(old.logp, batch.old_logp, shift, strict=True)),
        ref_logp=tuple(a + 0.1 * b for a, b in zip(old.logp, batch.rollout_logp, strict=True)),
        correction=tuple(0.5 + torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in lengths),
        weight=torch.tensor(token_weights(lengths, objective.aggregation, objective.constant_length)),
    )
    steps = [policy.update(batch) for _ in range(2)]
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "sums": [step.sums for step in steps],
        "weights": {name: tensor.clone() for name, tensor in policy.export()},
    }


def run(gangs, model: str, world: int, overrides: list[str]) -> list[dict]:
    # 7 samples of uneven lengths: data-parallel ranks get different numbers of tokens and of samples.
    return gangs(world).run(
        "tests.test_policy_losses:train", model=model, sequences=random_sequences(), overrides=[*BASE, *overrides]
    )


@pytest.fixture(scope="module")
def single(gangs, hf_models):
    """The one-process run of a preset, all samples in one microbatch."""
    done = {}

    def get(preset: str) -> dict:
        if preset not in done:
            done[preset] = run(gangs, hf_models["qwen3"], 1, ["parallel.tp=1", f"objective.preset={preset}"])[0]
        return done[preset]

    return get


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        *(("gspo", layout) for layout in LAYOUTS),  # its ratios are of whole sequences
        ("etr", "tp2"),
        ("etr", "cp2"),
        ("dr_grpo", "dp2"),
        ("cispo", "cp2"),
        ("rloo", "dp2"),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_layout(gangs, hf_models, single, preset, layout):
    world, overrides = LAYOUTS[layout]
    wanted = single(preset)
    clipped = wanted["sums"][0]["clip_upper"] + wanted["sums"][0]["clip_lower"]
    assert clipped == 0 if preset == "rloo" else clipped > 0
    assert min(wanted["grad_norm"]) > 0  # also measured with gradient clipping off
    for found in run(gangs, hf_models["qwen3"], world, [*overrides, f"objective.preset={preset}"]):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
        for a, b in zip(found["sums"], wanted["sums"], strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
        for name, tensor in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, atol=1e-5, rtol=1e-5)


def test_presets_train_differently(single):
    losses = [single(preset)["loss"][1] for preset in PRESETS]
    assert len({round(loss, 4) for loss in losses}) == len(PRESETS)


def pull_up(inputs: LossInputs) -> LossOutputs:
    """Maximises the plain log-prob, and reports it."""
    return regularized(inputs, inputs.logp, {"logp": inputs.logp})


def test_a_users_loss_by_import_path_trains(gangs, hf_models):
    overrides = ["parallel.tp=1", "objective.loss=tests.test_policy_losses:pull_up", "objective.kl_coef=0"]
    (found,) = run(gangs, hf_models["qwen3"], 1, overrides)
    before, after = (sums["loss/logp"] / sums["tokens"] for sums in found["sums"])
    assert after > before + 0.01
    assert {"ratio", "clip_upper", "kl", "tokens_pass_25_50"} <= found["sums"][0].keys()


class Waits(TorchFunctionMode):
    """Counts calls by the package's code, by place, for which a host waits for its GPU: reads of values, and copies from
    memory that is not pinned. Left out is what only runs on CPU."""

    READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    ON_CPU = ("local_layers.py", "_check_scale")

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        copies = name == "tensor" or (name == "to" and any(isinstance(one, torch.device | str) for one in args))
        if name in self.READS or copies or (name == "to" and "device" in kwargs):
            self._count()
        return func(*args, **kwargs)

    def _count(self) -> None:
        frame = sys._getframe(2)
        file, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        if Path(etr_megatron.__file__).parent in file.parents and not {file.name, function} & {*self.ON_CPU}:
            self.places[f"{file.name}:{function}:{frame.f_lineno}"] += 1


def waits_of_an_update(model: str, sequences: list, overrides: list[str]) -> tuple[int, Counter[str]]:
    """(microbatches of an update, its waits while they run)."""
    from etr_megatron.policy import policy as policy_module

    def watched(chunks: Any, micro: list, *args: Any, **options: Any) -> Any:
        sizes.append(len(micro))
        with waits:
            return run_schedule(chunks, micro, *args, **options)

    run_schedule, waits, sizes = policy_module.run_schedule, Waits(), []
    policy = build(model, overrides)
    batch = replace(make_batch(sequences), ref_logp=make_batch(sequences, seed=6).old_logp)
    if (experts := policy.arch.experts) is not None:
        shape = len(policy.arch.expert_layers), experts.per_token
        chosen = [torch.zeros(len(one.prompt), *shape, dtype=torch.uint8) for one in batch.sequences]
        batch = replace(
            batch, routing=StepRouting.of([values + torch.arange(shape[1], dtype=torch.uint8) for values in chosen])
        )
    with mock.patch.object(policy_module, "run_schedule", watched):
        policy.update(batch)
    return sizes[0], waits.places


@pytest.mark.parametrize(("family", "preset"), [("qwen3", "etr"), ("qwen3", "gspo"), ("qwen3_moe", "etr")])
def test_the_host_does_not_wait_for_its_gpu_between_microbatches(gangs, hf_models, family, preset):
    found = []
    for budget in (1, 1000):
        overrides = ["parallel.tp=1", f"objective.preset={preset}", "objective.kl_coef=0.1", "train.head_chunk_rows=7"]
        job = dict(model=hf_models[family], sequences=random_sequences())
        overrides += [f"train.tokens_per_microbatch={budget}"]
        found += gangs(1).run("tests.test_policy_losses:waits_of_an_update", **job, overrides=overrides)
    (many, of_many), (one, of_one) = found
    assert many == 7 and one == 1
    assert of_many == of_one and of_one.total() == 2  # after the last pass, one read for the loss and one for the gradients
