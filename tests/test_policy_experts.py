"""Mixtures of experts in the policy: how they are read, and which layouts are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from etr_megatron.checks import check_experts, check_inputs
from etr_megatron.config import Config, ModelConfig, ParallelConfig, validate
from etr_megatron.errors import UserError
from etr_megatron.weights import Experts, read_architecture

EXPERTS = Experts(count=6, per_token=3, intermediate_size=28, normalized=True)


def config_with(**parallel) -> Config:
    return Config(model=ModelConfig(path="somewhere"), parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("world", "parallel", "message"),
    [
        (4, dict(tp=1, ep=3), "the 4 ranks of a pipeline stage are not divisible by ep x etp = 3 x 1 = 3"),
        (4, dict(tp=2, ep=4), "the 4 ranks of a pipeline stage are not divisible by ep x etp = 4 x 2 = 8"),
        (4, dict(tp=2, pp=2, ep=2), "the 2 ranks of a pipeline stage are not divisible by ep x etp = 2 x 2 = 4"),
        (2, dict(tp=1, ep=0), "must be at least 1"),
        (2, dict(tp=1, etp=0), "must be at least 1, or null for tp"),
    ],
)
def test_experts_that_do_not_divide_the_ranks_are_refused_with_the_numbers(world, parallel, message):
    (problem,) = validate(config_with(**parallel), world)
    assert message in problem
    assert "parallel.ep = " in problem or "parallel.etp = " in problem


@pytest.mark.parametrize(
    ("world", "parallel"), [(4, dict(tp=2, ep=4, etp=1)), (4, dict(tp=2, ep=2)), (8, dict(pp=2, ep=4, tp=1))]
)
def test_experts_that_divide_the_ranks_pass(world, parallel):
    assert validate(config_with(**parallel), world) == []


def test_the_tiny_model_has_no_experts():
    (problem,) = validate(Config(parallel=ParallelConfig(tp=1, ep=2)), 2)
    assert "the tiny model has no experts" in problem


@pytest.mark.parametrize(
    ("experts", "parallel", "tp", "sentence"),
    [
        (None, dict(ep=2), 1, "m has no experts to spread over parallel.ep=2; set parallel.ep to 1"),
        (EXPERTS, dict(ep=4), 1, "m has 6 experts, which parallel.ep=4 does not divide"),
        (EXPERTS, dict(sequence_parallel=True), 8, "m has experts of width 28, which parallel.etp=8 does not divide"),
        (
            replace(EXPERTS, shared_size=54),
            dict(sequence_parallel=True, etp=1),
            4,
            "m has a shared expert of width 54, which parallel.tp=4 does not divide; choose a parallel.tp that does",
        ),
        (EXPERTS, dict(), 2, "m has experts, which need parallel.sequence_parallel=true with parallel.tp=2"),
    ],
)
def test_what_a_mixture_cannot_do_is_refused_in_one_sentence(experts, parallel, tp, sentence):
    with pytest.raises(UserError) as caught:
        check_experts("m", experts, ParallelConfig(**parallel), tp)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_a_mixture_on_a_layout_that_fits_passes():
    check_experts("m", EXPERTS, ParallelConfig(ep=3, sequence_parallel=True, etp=1), 2)
    check_experts("m", replace(EXPERTS, per_token=1, normalized=False), ParallelConfig(), 1)
    check_experts("m", replace(EXPERTS, shared_size=54), ParallelConfig(sequence_parallel=True), 2)
    check_experts("m", None, ParallelConfig(), 2)


def test_a_job_with_a_mixture_is_checked_before_it_starts(hf_models, tmp_path):
    config = Config(model=ModelConfig(path=hf_models["qwen3_moe"]), parallel=ParallelConfig(tp=1, ep=4))
    config = replace(config, run=replace(config.run, dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"has 6 experts, which parallel\.ep=4 does not divide"):
        check_inputs(config, 4)


def test_a_mixtures_config_is_read_with_its_dense_layers(hf_models):
    assert read_architecture(hf_models["qwen3_moe"]).experts == EXPERTS
    found = read_architecture(hf_models["qwen3_moe_dense"])
    assert found.experts == replace(EXPERTS, normalized=False, dense_layers=frozenset({0, 1, 2}))
    assert [found.has_experts(layer) for layer in range(4)] == [False, False, False, True]
