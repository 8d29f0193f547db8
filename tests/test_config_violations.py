"""Every rule of the config: its message, and the keys it depends on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from etr_megatron.config import Config, validate
from etr_megatron.config.defaults import fill_objective
from etr_megatron.config.load import KEYS
from etr_megatron.config.rules import RULES, get
from etr_megatron.config.validate import depends_on, violations
from tests.test_config_constraints import config_with

VIOLATIONS = [
    (dict(run__steps=2**31), ["run.steps"]),
    (dict(rollout__top_k=10**22), ["rollout.top_k"]),
    (dict(rollout__max_response_tokens=3073), ["data.max_prompt_tokens", "rollout.max_response_tokens"]),
    (dict(reward__workers=1025), ["reward.workers"]),
    (dict(run__phase_timeout_s=0.5), ["run.phase_timeout_s"]),
    (dict(train__lr=1e38), ["train.lr"]),
    (dict(tiny__warm_start_lr=1e38), ["tiny.warm_start_lr"]),
    (dict(train__adam_eps=1e-300), ["train.adam_eps"]),
    (dict(arithmetic__max_digits=1001), ["arithmetic.max_digits"]),
    (dict(run__name="a/b"), ["run.name"]),
    (dict(run__name=".."), ["run.name"]),
    (dict(run__name=""), ["run.name"]),
    (dict(run__name="a "), ["run.name"]),
    (dict(run__seed=2**32), ["run.seed"]),
    (dict(tiny__heads=3), ["tiny.heads"]),
    (dict(tiny__head_dim=15), ["tiny.head_dim"]),
    (dict(tiny__layers=1, parallel__pp=2, parallel__tp=1), ["parallel.pp", "tiny.layers"]),
    (dict(arithmetic__min_digits=4), ["arithmetic.min_digits", "arithmetic.max_digits"]),
    (dict(arithmetic__operators=("+", "/")), ["arithmetic.operators"]),
    (dict(arithmetic__operators=()), ["arithmetic.operators"]),
    (dict(arithmetic__operators=("+", "+")), ["arithmetic.operators"]),
    (dict(arithmetic__min_digits=1, arithmetic__max_digits=1), ["arithmetic.train_problems"]),
    (dict(data__prompt_template="Q:"), ["data.prompt_template"]),
    (dict(data__chat_template=False, data__chat_template_kwargs={"a": True}), ["data.chat_template_kwargs"]),
    (dict(data__eval=""), ["data.eval"]),
    (dict(checkpoint__keep_best=-1), ["checkpoint.keep_best"]),
    (dict(checkpoint__keep_best=1, eval__every=0), ["checkpoint.keep_best"]),
    (dict(checkpoint__keep_best=1, data__eval=None), ["checkpoint.keep_best"]),
    (dict(checkpoint__keep_best=1, eval__every=5, checkpoint__best_by="accuracy"), ["checkpoint.best_by"]),
    (dict(checkpoint__keep_best=1, eval__every=5, checkpoint__best_by="eval_pass_at_k"), ["checkpoint.best_by"]),
    (dict(checkpoint__keep_best=1, eval__every=5, checkpoint__best_by="eval/aime/accuracy"), ["checkpoint.best_by"]),
    (dict(data__eval={}), ["data.eval"]),
    (dict(data__eval={"a": ""}), ["data.eval"]),
    (dict(data__eval={"a/b": "c.jsonl"}), ["data.eval"]),
    (dict(data__eval={"": "c.jsonl"}), ["data.eval"]),
    (dict(data__train={}), ["data.train"]),
    (dict(data__train={"a": ""}), ["data.train"]),
    (dict(data__train={"a b": "c.jsonl"}), ["data.train"]),
    (dict(data__train={"größe": "c.jsonl"}), ["data.train"]),
    (
        dict(
            data__train={"a": "t.jsonl", "b": "arithmetic"}, data__eval=None, arithmetic__max_digits=1, arithmetic__min_digits=1
        ),
        ["arithmetic.train_problems"],
    ),
    (
        dict(data__train="t.jsonl", data__eval={"a": "arithmetic"}, arithmetic__max_digits=1, arithmetic__min_digits=1),
        ["arithmetic.train_problems"],
    ),
    (dict(data__train="a.jsonl@[0:16]"), ["data.train"]),
    (dict(data__eval={"a": "owner/a@test", "b": "arithmetic@test"}), ["data.eval"]),
    (dict(data__eval="owner/a@"), ["data.eval"]),
    (dict(data__eval="@test"), ["data.eval"]),
    (dict(data__prompt_column=""), ["data.prompt_column"]),
    (dict(data__answer_column=()), ["data.answer_column"]),
    (dict(data__prompt_column=("a", "")), ["data.prompt_column"]),
    (dict(data__answer_column=("a", "")), ["data.answer_column"]),
    (dict(data__id_column=("a", "")), ["data.id_column"]),
    (dict(data__id_column=()), ["data.id_column"]),
    (dict(reward__columns=("level",)), ["reward.columns", "reward.function"]),
    (dict(reward__columns=("level",), reward__function="m:f"), ["reward.columns", "data.train"]),
    (
        dict(reward__columns=("level",), reward__function="m:f", data__train={"a": "arithmetic"}, data__eval="e.jsonl"),
        ["reward.columns", "data.train"],
    ),
    (dict(reward__columns=("a", "a"), reward__function="m:f", data__train="t.jsonl"), ["reward.columns"]),
    (dict(reward__columns=("",), reward__function="m:f", data__train="t.jsonl"), ["reward.columns"]),
    (dict(eval__top_p=0.0), ["eval.top_p"]),
    (dict(eval__top_k=-1), ["eval.top_k"]),
    (dict(eval__max_response_tokens=0), ["eval.max_response_tokens"]),
    (dict(eval__max_response_tokens=4000), ["data.max_prompt_tokens", "eval.max_response_tokens"]),
    (
        dict(eval__max_response_tokens=4000, model__path="m", sglang__context_length=4999),
        ["sglang.context_length", "data.max_prompt_tokens", "eval.max_response_tokens"],
    ),
    (dict(environment__function="mine"), ["environment.function"]),
    (dict(environment__function=""), ["environment.function"]),
    (dict(environment__function="my file.py:f"), ["environment.function"]),
    (dict(environment__function="m:f", environment__role=""), ["environment.role"]),
    (dict(environment__function="m:f", environment__workers=1025), ["environment.workers"]),
    (dict(environment__role="tool"), ["environment.role", "environment.function"]),
    (dict(environment__timeout_s=5.0), ["environment.timeout_s", "environment.function"]),
    (dict(environment__function="m:f", reward__columns=("level",)), ["reward.columns", "data.train"]),
    (dict(reward__function="mine"), ["reward.function"]),
    (dict(reward__function="mine:"), ["reward.function"]),
    (dict(reward__function="my file.py:f"), ["reward.function"]),
    (dict(reward__extract=("boxed", "xml")), ["reward.extract"]),
    (dict(reward__extract=()), ["reward.extract"]),
    (dict(reward__range_min=1.0), ["reward.range_min", "reward.range_max"]),
    (dict(rollout__samples_per_prompt=1), ["rollout.samples_per_prompt"]),
    (dict(rollout__temperature=0.0), ["rollout.temperature"]),
    (dict(rollout__temperature=1e-39), ["rollout.temperature"]),
    (dict(eval__temperature=1e-39), ["eval.temperature"]),
    (dict(eval__samples=0), ["eval.samples"]),
    (dict(eval__samples=2**31, eval__temperature=1.0), ["eval.samples"]),
    (dict(eval__samples=4), ["eval.samples", "eval.temperature"]),
    (dict(eval__samples={"a": 1, "b": 4}, data__eval={"a": "a.jsonl", "b": "b.jsonl"}), ["eval.samples", "eval.temperature"]),
    (dict(eval__samples={"a": 0, "b": 1}, data__eval={"a": "a.jsonl", "b": "b.jsonl"}), ["eval.samples"]),
    (dict(eval__samples={"a": 1}), ["eval.samples", "data.eval"]),
    (dict(eval__samples={"c": 1}, data__eval={"a": "a.jsonl"}), ["eval.samples", "data.eval"]),
    (
        dict(sglang__router="random", train__routing_replay=True, rollout__backend="sglang"),
        ["sglang.router", "train.routing_replay"],
    ),
    (dict(rollout__stop_strings=("a", "")), ["rollout.stop_strings"]),
    (dict(rollout__stop_strings=("a", "b", "a")), ["rollout.stop_strings"]),
    (
        dict(rollout__backend="sglang", rollout__stop_strings=tuple(map(str, range(33)))),
        ["rollout.stop_strings", "rollout.backend"],
    ),
    (dict(rollout__top_p=0.0), ["rollout.top_p"]),
    (dict(rollout__top_p=1.1), ["rollout.top_p"]),
    (dict(rollout__prompts_per_step=6), ["rollout.prompts_per_step", "train.minibatches"]),
    (dict(objective__eps_max=1.0), ["objective.eps_max"]),
    (dict(objective__eps_min=0.5), ["objective.eps_min", "objective.eps_max"]),
    (dict(objective__eps_high=0.5), ["objective.eps_high"]),
    (dict(objective__alpha=1.5), ["objective.alpha"]),
    (dict(objective__gamma=1.5), ["objective.gamma"]),
    (dict(objective__log_ratio_bound=100.0), ["objective.log_ratio_bound"]),
    (dict(objective__loss="ppo"), ["objective.loss"]),
    (dict(objective__loss="my file.py:f"), ["objective.loss"]),
    (dict(objective__loss=""), ["objective.loss"]),
    (dict(objective__loss="gspo", objective__eps_max=1.0), ["objective.eps_max"]),
    (dict(objective__dual_clip=1.0), ["objective.dual_clip"]),
    (dict(objective__options={"margin": 0.1}), ["objective.options", "objective.loss"]),
    (dict(objective__preset="gspo", objective__dual_clip=3.0), ["objective.dual_clip", "objective.loss"]),
    (
        dict(objective__kl_coef=0.1, objective__kl_in="reward", objective__kl_estimator="k3", objective__normalize=False),
        ["objective.kl_estimator"],
    ),
    (dict(objective__preset="rloo", objective__kl_coef=0.1, objective__kl_estimator="k2"), ["objective.kl_in"]),
    (dict(objective__kl_coef=0.1, objective__kl_in="reward"), ["objective.normalize"]),
    (dict(objective__preset="rloo", objective__kl_coef=0.1, objective__normalize=True), ["objective.kl_in"]),
    (dict(rollout__backend="sglang", sglang__context_length=511, data__max_prompt_tokens=256), ["sglang.context_length"]),
    (dict(objective__correction_cap=0.0, objective__correction_floor=0.0), ["objective.correction_cap"]),
    (dict(objective__old_logp="engine", objective__correction="mask"), ["objective.old_logp", "objective.correction"]),
    (
        dict(objective__old_logp="engine", objective__preset="rloo", objective__kl_coef=0.1),
        ["objective.old_logp", "objective.kl_in"],
    ),
    (dict(data__train={"a": "a.jsonl"}, data__train_weights={"b": 1.0}), ["data.train_weights", "data.train"]),
    (dict(data__train={"a": "a.jsonl", "b": "b.jsonl"}, data__train_weights={"b": 1.0}), ["data.train_weights", "data.train"]),
    (dict(data__train={"a": "a.jsonl"}, data__train_weights={"a": 0.0}), ["data.train_weights"]),
    (dict(data__train_weights={"arithmetic": 1.0}), ["data.train_weights", "data.train"]),
    (dict(lora__rank=4, train__moe_freeze_router=True), ["train.moe_freeze_router", "lora.rank"]),
    (dict(objective__correction_floor=3.0), ["objective.correction_floor", "objective.correction_cap"]),
    (dict(reward__overlong_buffer=300), ["reward.overlong_buffer", "rollout.max_response_tokens"]),
    (dict(reward__overlong_penalty=-0.5), ["reward.overlong_penalty"]),
    (dict(train__min_lr=1.0), ["train.min_lr", "train.lr"]),
    (dict(train__adam_beta2=1.0), ["train.adam_beta2"]),
    (dict(train__lr_warmup_updates=400), ["train.lr_warmup_updates", "run.steps"]),
    (dict(parallel__tp=1, parallel__sequence_parallel=True), ["parallel.sequence_parallel", "parallel.tp"]),
    (dict(parallel__vpp=2), ["parallel.vpp", "parallel.pp"]),
    (dict(parallel__first_stage_layers=1), ["parallel.first_stage_layers", "parallel.pp"]),
    (dict(parallel__ep=2), ["parallel.ep", "model.path"]),
    (dict(parallel__etp=0), ["parallel.etp"]),
    (dict(train__head_chunk_rows=0), ["train.head_chunk_rows"]),
    (dict(train__overlap_param_gather=True, train__distributed_optimizer=True), ["train.overlap_grad_reduce"]),
    (dict(train__optimizer_offload=True), ["train.distributed_optimizer"]),
    (
        dict(train__offload_for_rollout=True, sglang__placement="colocated", rollout__backend="sglang"),
        ["train.offload_for_rollout", "train.distributed_optimizer"],
    ),
    (
        dict(train__offload_for_rollout=True, train__distributed_optimizer=True, rollout__backend="sglang"),
        ["train.offload_for_rollout", "sglang.placement"],
    ),
    (
        dict(train__optimizer_offload=True, train__distributed_optimizer=True, model__dtype="float32"),
        ["train.optimizer_offload", "model.dtype"],
    ),
    (dict(train__grads_dtype="bfloat16", model__dtype="float32"), ["train.grads_dtype", "model.dtype"]),
    (dict(fp8__param=True), ["fp8.param", "fp8.recipe"]),
    (dict(fp8__recipe="delayed", model__dtype="float32"), ["fp8.recipe", "model.dtype"]),
    (dict(fp8__recipe="delayed", fp8__first_last_layers_bf16=True), ["fp8.first_last_layers_bf16"]),
    (dict(fp8__recipe="tensorwise", fp8__param=True), ["fp8.param", "train.distributed_optimizer"]),
    (dict(rollout__partial=True, rollout__backend="sglang"), ["rollout.partial", "rollout.max_staleness"]),
    (dict(rollout__max_staleness=1), ["rollout.max_staleness", "rollout.backend"]),
    (
        dict(rollout__max_staleness=1, rollout__backend="sglang", sglang__placement="colocated"),
        ["sglang.placement", "rollout.max_staleness", "rollout.partial"],
    ),
    (dict(rollout__replay="runs/a"), ["rollout.replay", "eval.every"]),
    (dict(rollout__replay="runs/a", rollout__only=True, eval__every=0), ["rollout.only"]),
    (dict(sglang__urls=("nowhere",)), ["sglang.urls"]),
    (dict(sglang__devices=("0", "1")), ["sglang.devices", "sglang.servers", "sglang.tp"]),
    (
        dict(sglang__devices=("0", "1", "2"), sglang__nodes_per_server=3, sglang__tp=6, sglang__nodes="every"),
        ["sglang.devices", "sglang.servers", "sglang.tp", "sglang.nodes_per_server"],
    ),
    (
        dict(sglang__nodes_per_server=3, sglang__tp=6, sglang__urls=("http://a:1",)),
        ["sglang.nodes_per_server", "sglang.urls"],
    ),
    (
        dict(sglang__nodes_per_server=3, sglang__tp=6),
        ["sglang.nodes_per_server", "sglang.nodes", "sglang.dedicated_nodes"],
    ),
    (
        dict(sglang__nodes_per_server=3, sglang__tp=6, sglang__nodes="every", sglang__servers=2),
        ["sglang.nodes_per_server", "sglang.servers"],
    ),
    (dict(sglang__nodes_per_server=3, sglang__tp=8, sglang__nodes="every"), ["sglang.nodes_per_server", "sglang.tp"]),
    (
        dict(sglang__nodes_per_server=3, sglang__tp=6, sglang__dedicated_nodes=4),
        ["sglang.nodes_per_server", "sglang.dedicated_nodes"],
    ),
    (
        dict(sglang__nodes_per_server=3, sglang__tp=6, sglang__nodes="every", sglang__placement="colocated"),
        ["sglang.nodes_per_server", "sglang.placement", "sglang.mem_fraction"],
    ),
    (dict(sglang__ep=2), ["sglang.ep", "sglang.tp"]),
    (dict(sglang__dp_attention=4, sglang__tp=6), ["sglang.dp_attention", "sglang.tp"]),
    (dict(sglang__placement="external"), ["sglang.placement", "sglang.urls"]),
    (dict(sglang__nodes="every", sglang__urls=("http://a:1",)), ["sglang.nodes", "sglang.urls"]),
    (dict(sglang__checksums=True), ["sglang.checksums", "sglang.sync"]),
    (dict(sglang__placement="colocated", sglang__sync="broadcast"), ["sglang.sync", "sglang.placement"]),
    (dict(sglang__dedicated_nodes=1, sglang__nodes="every"), ["sglang.dedicated_nodes", "sglang.nodes"]),
    (dict(sglang__dedicated_nodes=1, sglang__sync="tensor"), ["sglang.dedicated_nodes", "sglang.sync"]),
    (dict(sglang__arguments=("--dtype",)), ["sglang.arguments"]),
    (dict(sglang__arguments=("--context-length",), sglang__context_length=9000), ["sglang.context_length"]),
    (dict(sglang__arguments=("--enable-eplb",), sglang__sync="sharded"), ["sglang.sync"]),
    (
        dict(sglang__arguments=("--enable-dp-lm-head",), sglang__sync="sharded", sglang__tp=2, sglang__dp_attention=2),
        ["sglang.arguments", "sglang.sync"],
    ),
    (dict(sglang__arguments=("--enable-dp-lm-head",)), ["sglang.arguments", "sglang.dp_attention"]),
]


@pytest.mark.parametrize(("values", "keys"), VIOLATIONS)
def test_violated_constraint_names_its_keys(values, keys):
    problems = validate(config_with(**values), None)
    assert len(problems) == 1
    assert all(f"{key} = " in problems[0] for key in keys)


@cache
def hint_of(key: str) -> Any:
    section, name = key.split(".")
    return get_type_hints(get_type_hints(Config)[section])[name]


def other_values(key: str, value: Any) -> list[Any]:
    """Some values of the key's type other than `value`."""
    hint = hint_of(key)
    if get_origin(hint) is tuple:
        return [other for other in ((), ("another",)) if other != value]
    if get_origin(hint) is dict:
        return [other for other in ({}, {"another": 1.0}) if other != value]
    choices = [choice for one in (hint, *get_args(hint)) if get_origin(one) is Literal for choice in get_args(one)]
    numbers = {bool: [True, False], int: [0, 1, 2, 10**6], float: [0.0, 1e-3, 0.3, 1.0, 1e6]}
    kinds = {hint, *get_args(hint)}
    plain = [value for kind in numbers if kind in kinds for value in numbers[kind]]
    texts = ["", "another", "none:here"] if str in kinds and not choices else []
    others = [None] if NoneType in kinds else []
    return [other for other in [*choices, *plain, *texts, *others] if other != value]


def filled(config: Config) -> Config:
    """What rules are applied to."""
    return replace(config, objective=fill_objective(config.objective))


@pytest.mark.parametrize(("values", "keys"), VIOLATIONS)
def test_a_violation_knows_every_key_that_it_depends_on(values, keys):
    """A rule is skipped if one of its keys could not be read and has its default."""
    config = config_with(**values)
    (violation,) = violations(config)
    (rule,) = [one for one in RULES if violation in one(filled(config))]  # to apply all of them takes ten times as long
    known = depends_on(violation, config)
    for key in sorted(KEYS - known):
        section, name = key.split(".")
        for other in other_values(key, get(config, key)):
            changed = replace(config, **{section: replace(getattr(config, section), **{name: other})})
            assert violation.keys in [one.keys for one in rule(filled(changed))], (key, other)
