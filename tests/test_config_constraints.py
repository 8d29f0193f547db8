"""Constraints between values, the layout, and what `resolve` fills in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from etr_megatron.config import (
    PRESETS,
    Config,
    SglangConfig,
    config_warnings,
    load_config,
    resolve,
    startup_timeout_of,
    validate,
)
from etr_megatron.config.reference import render_reference
from etr_megatron.errors import UserError


def config_with(**values: Any) -> Config:
    """`section__key=value` over the defaults, without any check."""
    config = Config()
    for path, value in values.items():
        section, key = path.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def test_defaults_and_every_preset_are_valid():
    for preset in PRESETS:
        assert validate(config_with(objective__preset=preset), 2) == []


def numeric_keys() -> list[str]:
    found = []
    for section, cls in get_type_hints(Config).items():
        for name, hint in get_type_hints(cls).items():
            if get_origin(hint) is not dict and {int, float} & {hint, *get_args(hint)}:
                found.append(f"{section}.{name}")
    return [key for key in found if key not in ("reward.range_min", "reward.range_max")]


@pytest.mark.parametrize("key", numeric_keys())
def test_no_number_may_be_minus_one(key):
    assert any(f"{key} = -1" in problem for problem in validate(config_with(**{key.replace(".", "__"): -1}), 2))


@pytest.mark.parametrize("key", [key for key in numeric_keys() if key.endswith("_s")])
def test_no_wait_may_be_longer_than_the_system_can_wait(key):
    """poll takes milliseconds as a C int, so `run.phase_timeout_s=1e10` made torch's store fail with a traceback."""
    path = key.replace(".", "__")
    assert validate(config_with(environment__function="m:f", **{path: 1e6}), 2) == []
    assert any(f"{key} = 2147484.0: must be at most 1e+06" in p for p in validate(config_with(**{path: 2147484.0}), 2))


def test_every_operator_has_problems_of_its_own():
    two_digits = dict(arithmetic__min_digits=2, arithmetic__max_digits=2, arithmetic__train_problems=15_000)
    assert "there are at most 10000 different problems" in validate(config_with(**two_digits), None)[0]
    assert validate(config_with(**two_digits, arithmetic__operators=("+", "-")), None) == []


@pytest.mark.parametrize("function", ["math", "reward:f", "my.rewards.math:Grader.score"])
def test_reward_function_forms(function):
    assert validate(config_with(reward__function=function), None) == []


@pytest.mark.parametrize("function", [None, "games:play", "my.games.chess:Board.reply"])
def test_environment_function_forms(function):
    assert validate(config_with(environment__function=function), None) == []


def test_columns_may_be_the_environments_alone():
    columns = dict(reward__columns=("level",), data__train="t.jsonl", data__eval=None, eval__every=0)
    assert validate(config_with(environment__function="m:f", **columns), None) == []
    assert "the math reward does not use columns" in validate(config_with(**columns), None)[0]


@pytest.mark.parametrize("loss", ["clipped", "gspo", "cispo", "reinforce", "losses:f", "my.losses:Family.loss"])
def test_loss_forms(loss):
    assert validate(config_with(objective__loss=loss), None) == []


@pytest.mark.parametrize(
    ("loss", "epochs", "minibatches", "has_warning"),
    [("reinforce", 1, 4, True), ("reinforce", 2, 1, True), ("reinforce", 1, 1, False), ("clipped", 2, 4, False)],
)
def test_a_loss_without_a_ratio_gets_a_warning_over_several_optimizer_steps(loss, epochs, minibatches, has_warning):
    config = config_with(objective__loss=loss, train__epochs=epochs, train__minibatches=minibatches)
    assert validate(config, None) == []
    told = f'objective.loss = "{loss}", train.epochs = {epochs}, train.minibatches = {minibatches}: this loss has no'
    assert [warning.startswith(told) for warning in config_warnings(config)] == [True] * has_warning


def test_a_presets_loss_is_doubted_too():
    assert len(config_warnings(config_with(objective__preset="rloo"))) == 1
    assert config_warnings(config_with(objective__preset="rloo", train__minibatches=1)) == []


@pytest.mark.parametrize(
    ("staleness", "old_logp", "correction", "has_warning"),
    [(1, "trainer", "none", True), (0, "trainer", "none", False), (1, "engine", "none", False), (1, "trainer", "mask", False)],
)
def test_stale_tokens_that_nothing_corrects_get_a_warning(staleness, old_logp, correction, has_warning):
    objective = dict(objective__old_logp=old_logp, objective__correction=correction)
    config = config_with(rollout__backend="sglang", rollout__max_staleness=staleness, **objective)
    told = (
        f'rollout.max_staleness = {staleness}, objective.old_logp = "trainer", objective.correction = "none": tokens of older'
    )
    assert [warning.startswith(told) for warning in config_warnings(config)] == [True] * has_warning


def test_best_checkpoints_that_are_not_saved_and_a_profile_that_is_not_made_are_doubted():
    kept = dict(checkpoint__keep_best=1, eval__every=5)
    assert [len(config_warnings(config_with(checkpoint__every=every, **kept))) for every in (5, 10, 12, 0)] == [0, 0, 1, 1]
    assert config_warnings(config_with(checkpoint__every=12, eval__every=5)) == []
    assert [len(config_warnings(config_with(run__steps=4, observe__profile_step=step))) for step in (0, 4, 5)] == [0, 0, 1]
    assert len(config_warnings(config_with(observe__profile_step=1, rollout__only=True))) == 1


@pytest.mark.parametrize(
    ("metric", "samples", "is_there"),
    [
        ("eval_accuracy", 1, True),
        ("eval_pass_at_k", {"aime": 4}, True),
        ("eval/aime/pass_at_k", {"aime": 4}, True),
        ("eval/amc/pass_at_k", {"aime": 4}, False),
        ("eval/amc/reward_mean", 1, True),
        ("eval/other/accuracy", 1, False),
        ("eval/amc/truncated_frac", 1, False),  # of which less is better
    ],
)
def test_the_best_checkpoints_are_those_by_a_metric_that_the_evaluations_have(metric, samples, is_there):
    sets = dict(data__eval={"aime": "a.jsonl", "amc": "b.jsonl"}, eval__samples=samples, eval__temperature=1.0, eval__every=5)
    problems = validate(config_with(checkpoint__keep_best=1, checkpoint__best_by=metric, **sets), None)
    assert (problems == []) == is_there
    assert validate(config_with(checkpoint__best_by=metric, **sets), None) == []  # no effect without keep_best


def test_only_a_truncated_weight_may_have_a_radius_of_one_or_more():
    assert validate(config_with(objective__loss="cispo", objective__eps_high=4.0, objective__eps_max=4.0), None) == []
    assert validate(config_with(objective__eps_high=4.0, objective__eps_max=4.0), None) != []


@pytest.mark.parametrize("preset", ["etr", "rloo"])
def test_the_kl_estimator_left_open_is_the_one_that_pulls_to_the_reference(preset):
    for where, estimator in (("reward", "k1"), ("loss", "k3")):
        values = dict(objective__preset=preset, objective__normalize=False)
        config = config_with(**values, objective__kl_in=where, objective__kl_coef=0.1)
        assert resolve(config, 1, cuda=False).objective.kl_estimator == estimator
    unused = config_with(objective__preset=preset, objective__kl_in="reward", objective__kl_estimator="k2")
    assert validate(unused, None) == []  # kl_coef is 0


def test_several_new_violations_are_told_at_once():
    problems = validate(
        config_with(
            objective__dual_clip=0.5, objective__correction_floor=9.0, objective__loss="x", reward__overlong_buffer=999
        ),
        None,
    )
    assert len(problems) == 4


def test_an_algorithms_name_gives_everything_that_it_is_and_what_is_set_stays():
    gspo = resolve(config_with(objective__preset="gspo"), 1, cuda=False).objective
    assert (gspo.loss, gspo.aggregation, gspo.eps_low, gspo.eps_high) == ("gspo", "sequence_mean", 3e-4, 4e-4)
    rloo = resolve(config_with(objective__preset="rloo", objective__kl_in="loss"), 1, cuda=False).objective
    assert (rloo.loss, rloo.baseline, rloo.normalize, rloo.kl_in) == ("reinforce", "leave_one_out", False, "loss")
    dr_grpo = resolve(config_with(objective__preset="dr_grpo"), 1, cuda=False).objective
    assert (dr_grpo.loss, dr_grpo.aggregation, dr_grpo.normalize) == ("clipped", "constant_length", False)


def test_presets_that_are_compared_differ_in_the_clip_range_alone():
    of_the_range = {"micro", "macro", "control", "alpha", "gamma", "eps_low", "eps_high", "eps_min", "eps_max"}
    compared = [name for name in PRESETS if name.startswith("etr") or name in ("grpo", "dapo")]
    rest = [{key: value for key, value in PRESETS[name].items() if key not in of_the_range} for name in compared]
    assert len(compared) == 9 and all(values == rest[0] for values in rest)


RANGES = {  # micro, macro, control, eps0 low / high, eps_min, eps_max
    "etr": ("tanh", "variance", "none", 0.2, 0.2, 0.05, 0.4),
    "grpo": ("none", "none", "none", 0.2, 0.2, 0.0, 0.99),
    "dapo": ("none", "none", "none", 0.2, 0.28, 0.0, 0.99),
    "etr_micro": ("tanh", "none", "none", 0.2, 0.2, 0.05, 0.4),
    "etr_macro": ("none", "variance", "none", 0.2, 0.2, 0.05, 0.4),
    "etr_second_order": ("linear", "std", "none", 0.2, 0.2, 0.0, 0.4),
    "etr_matched": ("tanh", "variance", "matched", 0.2, 0.2, 0.05, 0.4),
    "etr_shuffled": ("tanh", "variance", "shuffled", 0.2, 0.2, 0.05, 0.4),
    "etr_inverted_macro": ("tanh", "inverse_variance", "none", 0.2, 0.2, 0.05, 0.4),
    "dr_grpo": ("none", "none", "none", 0.2, 0.2, 0.0, 0.99),
    "gspo": ("none", "none", "none", 3e-4, 4e-4, 0.0, 0.99),
    "cispo": ("none", "none", "none", 1.0, 4.0, 0.0, 4.0),
    "rloo": ("none", "none", "none", 0.2, 0.2, 0.0, 0.99),
}


def test_the_presets_ranges_are_those_of_their_definitions():
    keys = ("micro", "macro", "control", "eps_low", "eps_high", "eps_min", "eps_max")
    assert {name: tuple(values[key] for key in keys) for name, values in PRESETS.items()} == RANGES
    for name, values in PRESETS.items():
        assert values["alpha"] == (0.5 if values["micro"] == "tanh" else 0.0), name
        assert values["gamma"] == (0.5 if "variance" in values["macro"] else 0.0), name


ALGORITHMS = {  # loss, aggregation, baseline, normalize, kl_in of the presets in which these differ from GRPO's
    "dr_grpo": ("clipped", "constant_length", "group_mean", False, "loss"),
    "gspo": ("gspo", "sequence_mean", "group_mean", True, "loss"),
    "cispo": ("cispo", "token_mean", "group_mean", True, "loss"),
    "rloo": ("reinforce", "constant_length", "leave_one_out", False, "reward"),
}


def test_the_presets_are_otherwise_the_algorithms_that_they_are_named_after():
    keys = ("loss", "aggregation", "baseline", "normalize", "kl_in")
    for name, values in PRESETS.items():
        wanted = ALGORITHMS.get(name, ("clipped", "token_mean", "group_mean", True, "loss"))
        assert tuple(values[key] for key in keys) == wanted, name


def test_the_presets_are_those_that_can_be_named():
    hint = get_type_hints(type(Config().objective))["preset"]
    assert hint.__args__ == tuple(PRESETS)
    assert len({tuple(values) for values in PRESETS.values()}) == 1, "every preset gives the same fields, in the same order"


def test_minibatches_need_not_be_divisible_by_data_parallel_ranks():
    assert validate(config_with(rollout__prompts_per_step=4, parallel__tp=1), 8) == []


def test_world_size_that_the_layout_does_not_divide_names_all_numbers():
    (problem,) = validate(config_with(parallel__tp=2, parallel__pp=3), 8)
    assert "world size 8" in problem
    assert "2 x 3 = 6" in problem
    assert "multiple of 6 ranks" in problem


@pytest.mark.parametrize(("world", "pp", "tp"), [(1, 1, 1), (2, 1, 2), (4, 1, 2), (2, 2, 1), (4, 2, 2)])
def test_auto_tensor_parallel(world, pp, tp):
    assert resolve(config_with(parallel__pp=pp), world, cuda=False).parallel.tp == tp


def test_sequence_parallel_on_one_rank_is_refused_once_the_world_is_known():
    config = config_with(parallel__sequence_parallel=True)
    assert validate(config, None) == validate(config, 2) == []
    assert "needs tp > 1" in validate(config, 1)[0]


@pytest.mark.parametrize(("heads", "tp", "refused"), [(4, 4, False), (8, 2, False), (6, 4, True), (12, 4, True), (4, 8, True)])
def test_heads_of_the_tiny_model_must_be_divided_or_shared_evenly_by_tp(heads: int, tp: int, refused: bool):
    problems = validate(config_with(parallel__tp=tp, tiny__heads=heads), tp)
    assert len(problems) == refused
    assert all(f"and be a divisor or a multiple of the {heads // 2} key/value heads" in problem for problem in problems)
    assert validate(config_with(parallel__tp=tp, tiny__heads=heads, model__path="elsewhere"), tp) == []


def test_resolve_leaves_nothing_open_on_cpu():
    config = resolve(Config(), 2, cuda=False)
    assert (config.run.platform, config.model.dtype, config.parallel.tp) == ("cpu", "float32", 2)
    assert config.rollout.max_logprob_gap == 1e-4
    assert config.objective.constant_length == config.rollout.max_response_tokens
    assert [key for key, value in vars(config.objective).items() if value is None] == ["dual_clip"]  # None turns it off
    assert (config.objective.micro, config.objective.eps_max) == ("tanh", 0.4)


def test_resolve_on_cuda_takes_bfloat16_and_keeps_what_was_set():
    config = resolve(config_with(objective__alpha=0.25, objective__preset="dapo"), 1, cuda=True)
    assert (config.run.platform, config.model.dtype, config.rollout.max_logprob_gap) == ("cuda", "bfloat16", 5e-2)
    assert (config.objective.alpha, config.objective.eps_high) == (0.25, 0.28)
    assert resolve(config_with(run__platform="cpu"), 1, cuda=True).model.dtype == "float32"


def test_a_request_has_time_for_the_longest_response():
    given = [
        {},
        dict(rollout__max_response_tokens=40000),
        dict(rollout__max_response_tokens=40000, eval__max_response_tokens=65536, data__eval="a.jsonl"),
        dict(rollout__max_response_tokens=40000, sglang__request_timeout_s=60.0),
    ]
    found = [resolve(config_with(model__path="m", **settings), 1, cuda=False).sglang.request_timeout_s for settings in given]
    assert found == [1800, 4000, 6553.6, 60]


def test_servers_of_fp8_have_time_to_compile_before_they_answer():
    given = [{}, {"fp8": True}, {"fp8": True, "startup_timeout_s": 30.0}]
    assert [startup_timeout_of(SglangConfig(**settings)) for settings in given] == [900, 2400, 30]
    assert "greater than 0" in validate(config_with(sglang__startup_timeout_s=0.0), 1)[0]


@pytest.mark.parametrize(
    "fp8", [{"fp8__recipe": "blockwise"}, {"sglang__fp8": True, "rollout__backend": "sglang"}], ids=["trainer", "servers"]
)
def test_the_gate_of_the_first_step_is_wider_where_fp8_rounds(fp8):
    config = resolve(config_with(model__dtype="bfloat16", **fp8), 1, cuda=True)
    assert config.rollout.max_logprob_gap == 0.2


def test_resolve_is_idempotent():
    once = resolve(Config(), 2, cuda=False)
    assert resolve(once, 2, cuda=False) == once


def test_resolve_lists_every_violation():
    with pytest.raises(UserError) as caught:
        resolve(config_with(run__platform="cuda", run__steps=0, parallel__tp=2), 3, cuda=False)
    text = str(caught.value)
    assert all(part in text for part in ("run.steps = 0", "world size 3", "no CUDA device"))


def test_reference_is_current_and_documents_every_key():
    docs = Path(__file__).parents[1] / "docs" / "config.md"
    assert docs.read_text() == render_reference(), "run: python -m etr_megatron.config > docs/config.md"
    for line in docs.read_text().splitlines():
        assert not line.rstrip().endswith("|  |"), f"a key without a docstring: {line}"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_config_is_valid(path):
    load_config(path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.max_staleness=1"], "can be neither interrupted nor run during training"),
        (["rollout.partial=true", "rollout.max_staleness=1"], "can be neither interrupted nor run during training"),
        (["rollout.backend=sglang", "rollout.partial=true"], "set max_staleness to at least 1"),
        (["rollout.max_oversample=0.9"], "must be at least 1"),
        (["rollout.replay=runs/first"], "has no engine to evaluate with"),
        (["rollout.replay=runs/first", "rollout.only=true", "eval.every=0"], "remove one of the two"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_the_start(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "values",
    [
        dict(nodes="every", devices=("2", "3")),
        dict(dedicated_nodes=6),
        dict(nodes="every", placement="colocated", mem_fraction=0.5),
    ],
)
def test_a_server_of_six_gpus_may_span_three_nodes(values):
    sglang = dict(nodes_per_server=3, tp=6) | values
    assert validate(config_with(**{f"sglang__{key}": value for key, value in sglang.items()}), None) == []


def test_the_nodes_of_a_server_are_not_set_by_its_own_argument():
    (problem,) = validate(config_with(sglang__arguments=("--nnodes=3",)), None)
    assert problem.endswith(": --nnodes is set by the job, see sglang.nodes_per_server")
