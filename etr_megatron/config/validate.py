"""What must hold between the values of a `Config`: pure functions that return every violation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from etr_megatron.config.defaults import fill_objective, tensor_parallel
from etr_megatron.config.presets import LOSSES, PRESETS
from etr_megatron.config.schema import Config

EXTRACTORS = ("boxed", "hash", "last_number")
OPERATORS = ("+", "-", "*")
_NAME = r"[^\W\d]\w*"
IMPORT_PATH = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}(\.{_NAME})*")
"""`package.module:function`, where the function may be an attribute of a class."""
BYTE_VOCAB = 260
"""A byte-level BPE starts from 256 bytes and a few special tokens."""

AT_LEAST: dict[str, int] = {
    "run.seed": 0,
    "run.steps": 1,
    "tiny.hidden_size": 1,
    "tiny.layers": 1,
    "tiny.heads": 2,
    "tiny.head_dim": 2,
    "tiny.intermediate_size": 1,
    "tiny.vocab_size": BYTE_VOCAB,
    "tiny.warm_start_steps": 0,
    "tiny.warm_start_batch": 1,
    "tiny.warm_start_seed": 0,
    "arithmetic.min_digits": 1,
    "arithmetic.train_problems": 1,
    "arithmetic.eval_problems": 1,
    "arithmetic.seed": 0,
    "data.max_prompt_tokens": 1,
    "reward.workers": 1,
    "reward.overlong_buffer": 0,
    "rollout.prompts_per_step": 1,
    "rollout.max_response_tokens": 1,
    "rollout.top_k": 0,
    "rollout.batch_samples": 1,
    "sglang.servers": 1,
    "sglang.tp": 1,
    "sglang.concurrency": 1,
    "sglang.bucket_mib": 1,
    "train.minibatches": 1,
    "train.epochs": 1,
    "train.tokens_per_microbatch": 1,
    "train.lr_warmup_updates": 0,
    "parallel.pp": 1,
    "parallel.ep": 1,
    "eval.every": 0,
    "eval.problems": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "observe.rollouts_every": 0,
    "observe.rollouts_groups": 1,
}
"""Whole numbers and their least value."""

POSITIVE = (
    "run.phase_timeout_s",
    "tiny.warm_start_lr",
    "reward.timeout_s",
    "rollout.temperature",
    "sglang.startup_timeout_s",
    "sglang.request_timeout_s",
    "sglang.update_timeout_s",
    "objective.correction_cap",
    "train.lr",
    "train.adam_eps",
)
NOT_NEGATIVE = (
    "reward.overlong_penalty",
    "objective.eps_low",
    "objective.eps_high",
    "objective.eps_min",
    "objective.delta",
    "objective.kl_coef",
    "objective.entropy_coef",
    "objective.correction_floor",
    "train.min_lr",
    "train.weight_decay",
    "train.clip_grad",
    "eval.temperature",
)
NOT_EMPTY = (
    "run.name",
    "run.dir",
    "model.path",
    "tiny.cache_dir",
    "data.train",
    "data.train_split",
    "data.eval_split",
    "data.prompt_column",
    "data.answer_column",
    "reward.extract",
    "arithmetic.operators",
)


@dataclass(frozen=True)
class Violation:
    """A constraint that does not hold. keys: the `section.key`s it is about. message: the constraint and the way out."""

    keys: tuple[str, ...]
    message: str


def validate(config: Config, world_size: int | None) -> list[str]:
    """Every violated constraint as `key = value: constraint`; layout constraints too where `world_size` is known."""
    return [render(violation, config) for violation in violations(config, world_size)]


def violations(config: Config, world_size: int | None = None) -> list[Violation]:
    """Every violated constraint of `config`; null objective fields are judged with the preset's values."""
    config = replace(config, objective=fill_objective(config.objective))
    found: list[Violation] = []
    for check in _CHECKS:
        found.extend(check(config))
    if world_size is not None:
        found.extend(_layout(config, world_size))
    return found


def render(violation: Violation, config: Config, sources: Mapping[str, str] | None = None) -> str:
    """One sentence: `key = value (source), ...: constraint`. sources: key -> where its value was written."""
    filled = replace(config, objective=fill_objective(config.objective))
    parts = []
    for key in violation.keys:
        source = ""
        if sources is not None:
            section, name = key.split(".")
            from_preset = section == "objective" and getattr(config.objective, name) is None
            inherited = name in PRESETS[config.objective.preset] and from_preset
            source = f" ({sources.get(key) or (f'preset {config.objective.preset}' if inherited else 'default')})"
        parts.append(f"{key} = {json.dumps(_get(filled, key), ensure_ascii=False)}{source}")
    return f"{', '.join(parts)}: {violation.message}"


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _bounds(config: Config) -> Iterator[Violation]:
    for key, least in AT_LEAST.items():
        if _get(config, key) < least:
            yield Violation((key,), f"must be at least {least}")
    for key in POSITIVE:
        if _get(config, key) <= 0:
            yield Violation((key,), "must be greater than 0")
    for key in NOT_NEGATIVE:
        if _get(config, key) < 0:
            yield Violation((key,), "must not be negative")
    for key in NOT_EMPTY:
        if not _get(config, key):
            yield Violation((key,), "must not be empty")
    for key in ("run.seed", "tiny.warm_start_seed", "arithmetic.seed"):
        if _get(config, key) >= 2**32:
            yield Violation((key,), "must be below 2**32")
    for key in ("objective.alpha", "objective.gamma", "tiny.forgotten_carry", "tiny.wrong_digit"):
        if not 0 <= _get(config, key) <= 1:
            yield Violation((key,), "must lie between 0 and 1")
    for key in ("train.adam_beta1", "train.adam_beta2"):
        if not 0 <= _get(config, key) < 1:
            yield Violation((key,), "must be at least 0 and below 1")


def _run(config: Config) -> Iterator[Violation]:
    name = config.run.name
    if any(separator in name for separator in "/\\\0") or name in (".", ".."):
        yield Violation(("run.name",), "names a directory inside run.dir and must hold no path separator")
    if name != name.strip():
        yield Violation(("run.name",), "must not begin or end with a space")


def _tiny(config: Config) -> Iterator[Violation]:
    tiny = config.tiny
    if tiny.heads % 2:
        yield Violation(("tiny.heads",), "must be even, as there are half as many key/value heads")
    if tiny.head_dim % 2:
        yield Violation(("tiny.head_dim",), "must be even, as rotary embeddings turn pairs of dimensions")
    if config.model.path == "tiny" and tiny.layers < config.parallel.pp:
        yield Violation(("parallel.pp", "tiny.layers"), "every pipeline stage needs at least one layer")


def _arithmetic(config: Config) -> Iterator[Violation]:
    task = config.arithmetic
    if task.max_digits < task.min_digits:
        yield Violation(("arithmetic.min_digits", "arithmetic.max_digits"), "min_digits must not exceed max_digits")
    yield from _names(config, "arithmetic.operators", OPERATORS)
    if "arithmetic" in (config.data.train, config.data.eval) and task.operators and 1 <= task.max_digits <= 18:
        possible = 10 ** (2 * task.max_digits) * len(set(task.operators))
        if possible < task.train_problems + task.eval_problems:
            yield Violation(
                ("arithmetic.train_problems", "arithmetic.eval_problems", "arithmetic.max_digits"),
                f"there are at most {possible} different problems; ask for fewer, or allow more digits",
            )


def _data(config: Config) -> Iterator[Violation]:
    if "{prompt}" not in config.data.prompt_template:
        yield Violation(("data.prompt_template",), "must contain {prompt}, which stands for the problem's text")
    for key in ("data.eval", "data.id_column"):
        if _get(config, key) == "":
            yield Violation((key,), "must not be empty; null is none")


def _reward(config: Config) -> Iterator[Violation]:
    reward = config.reward
    yield from _names(config, "reward.extract", EXTRACTORS)
    if reward.function != "math" and not IMPORT_PATH.fullmatch(reward.function):
        yield Violation(("reward.function",), "must be math, or a function's import path as package.module:function")
    if reward.range_min >= reward.range_max:
        yield Violation(("reward.range_min", "reward.range_max"), "range_min must be below range_max")
    if reward.overlong_buffer > config.rollout.max_response_tokens:
        yield Violation(
            ("reward.overlong_buffer", "rollout.max_response_tokens"), "overlong_buffer must not exceed max_response_tokens"
        )


def _names(config: Config, key: str, allowed: tuple[str, ...]) -> Iterator[Violation]:
    values = _get(config, key)
    unknown = [value for value in values if value not in allowed]
    if unknown:
        yield Violation((key,), f"{', '.join(unknown)} is not one of {', '.join(allowed)}")
    if len(set(values)) < len(values):
        yield Violation((key,), "must not name anything twice")


def _rollout(config: Config) -> Iterator[Violation]:
    rollout = config.rollout
    if rollout.samples_per_prompt < 2:
        yield Violation(
            ("rollout.samples_per_prompt",),
            "must be at least 2: the advantage compares the responses to one prompt, and is 0 for a single one",
        )
    if not 0 < rollout.top_p <= 1:
        yield Violation(("rollout.top_p",), "must be greater than 0 and at most 1")
    if rollout.max_logprob_gap is not None and rollout.max_logprob_gap <= 0:
        yield Violation(("rollout.max_logprob_gap",), "must be greater than 0; null takes the default of the dtype")
    updates = config.train.minibatches
    if updates >= 1 and rollout.prompts_per_step % updates:
        yield Violation(
            ("rollout.prompts_per_step", "train.minibatches"),
            "prompts_per_step must be divisible by minibatches, as minibatches are made of whole groups",
        )


def _sglang(config: Config) -> Iterator[Violation]:
    sglang = config.sglang
    if any(not re.match(r"https?://[^/]+", url) for url in sglang.urls):
        yield Violation(("sglang.urls",), "every server's address must be http://host:port")
    if len(set(sglang.urls)) < len(sglang.urls):
        yield Violation(("sglang.urls",), "must not name a server twice")
    if sglang.devices and len(sglang.devices) != sglang.servers * sglang.tp:
        yield Violation(
            ("sglang.devices", "sglang.servers", "sglang.tp"),
            f"{sglang.servers} servers of tp {sglang.tp} take {sglang.servers * sglang.tp} GPUs",
        )


def _objective(config: Config) -> Iterator[Violation]:
    objective = config.objective
    if objective.loss not in LOSSES and not IMPORT_PATH.fullmatch(objective.loss or ""):
        yield Violation(
            ("objective.loss",), f"must be one of {', '.join(LOSSES)}, or a function's import path as package.module:function"
        )
    if objective.dual_clip is not None:
        if objective.dual_clip <= 1:
            yield Violation(("objective.dual_clip",), "must be greater than 1; null is off")
        if objective.loss in LOSSES and objective.loss != "clipped":
            yield Violation(("objective.dual_clip", "objective.loss"), "only the clipped loss has a dual clip; set it to null")
    if objective.kl_coef > 0 and objective.kl_in == "reward" and objective.kl_estimator != "k1":
        yield Violation(
            ("objective.kl_in", "objective.kl_estimator"),
            "a reward is a constant, so that only k1 pulls to the reference there; set kl_estimator to k1, or kl_in to loss",
        )
    if objective.correction_floor > objective.correction_cap:
        yield Violation(
            ("objective.correction_floor", "objective.correction_cap"), "correction_floor must not exceed correction_cap"
        )
    if not 0 < objective.log_ratio_bound <= 80:
        yield Violation(
            ("objective.log_ratio_bound",), "must be greater than 0 and at most 80, where exp() leaves the float32 range"
        )
    if objective.constant_length is not None and objective.constant_length < 1:
        yield Violation(("objective.constant_length",), "must be at least 1; null is rollout.max_response_tokens")


def _clip_range(config: Config) -> Iterator[Violation]:
    objective = config.objective
    if objective.loss in ("clipped", "gspo") and objective.eps_max >= 1:
        yield Violation(("objective.eps_max",), "must be below 1, else the lower clip bound 1 - eps is not positive")
    if objective.eps_min > objective.eps_max:
        yield Violation(("objective.eps_min", "objective.eps_max"), "eps_min must not exceed eps_max")
        return
    for side in ("eps_low", "eps_high"):
        if not objective.eps_min <= getattr(objective, side) <= objective.eps_max:
            yield Violation(
                (f"objective.{side}", "objective.eps_min", "objective.eps_max"),
                f"{side} must lie between eps_min and eps_max, else it never takes effect",
            )


def _train(config: Config) -> Iterator[Violation]:
    train = config.train
    if train.head_chunk_rows is not None and train.head_chunk_rows < 1:
        yield Violation(("train.head_chunk_rows",), "must be at least 1; null chooses by device")
    if train.min_lr > train.lr:
        yield Violation(("train.min_lr", "train.lr"), "min_lr must not exceed lr")
    if min(train.minibatches, train.epochs, config.run.steps) >= 1:
        updates = config.run.steps * train.epochs * train.minibatches
        if train.lr_warmup_updates >= updates:
            yield Violation(
                ("train.lr_warmup_updates", "run.steps", "train.epochs", "train.minibatches"),
                f"the warm-up must end before the run does, which has {updates} optimizer steps",
            )


def _parallel(config: Config) -> Iterator[Violation]:
    tp = config.parallel.tp
    if tp != "auto" and tp < 1:
        yield Violation(("parallel.tp",), "must be at least 1, or auto")
    if tp == 1 and config.parallel.sequence_parallel:
        yield Violation(
            ("parallel.sequence_parallel", "parallel.tp"),
            "sequence parallelism splits over tensor-parallel ranks and needs tp > 1; set it to false",
        )
    if config.parallel.etp is not None and config.parallel.etp < 1:
        yield Violation(("parallel.etp",), "must be at least 1; null is tp")
    if config.model.path == "tiny" and config.parallel.ep > 1:
        yield Violation(("parallel.ep", "model.path"), "the tiny model has no experts to spread; set ep to 1")


def _layout(config: Config, world_size: int) -> Iterator[Violation]:
    """Constraints between the layout and the number of ranks."""
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    tp, pp = tensor_parallel(config.parallel, world_size), config.parallel.pp
    if tp < 1 or pp < 1:
        return  # told by the bounds
    if world_size % (tp * pp):
        yield Violation(
            ("parallel.tp", "parallel.pp"),
            f"world size {world_size} is not divisible by tp x pp = {tp} x {pp} = {tp * pp}; start a multiple of "
            f"{tp * pp} ranks, or set tp and pp so that their product divides {world_size}",
        )
    else:
        yield from _experts_layout(config, world_size // pp, tp)
    if config.parallel.tp == "auto" and tp == 1 and config.parallel.sequence_parallel:
        yield Violation(
            ("parallel.sequence_parallel", "parallel.tp"),
            f"tp is 1 on {world_size} ranks, and sequence parallelism needs tp > 1; start more ranks or set it to false",
        )
    heads = config.tiny.heads
    if config.model.path == "tiny" and heads >= 2 and heads % 2 == 0 and (heads // 2) % tp:
        yield Violation(("tiny.heads", "parallel.tp"), f"the {heads // 2} key/value heads must be divisible by tp = {tp}")


def _experts_layout(config: Config, stage_ranks: int, tp: int) -> Iterator[Violation]:
    """Experts cut the ranks of a pipeline stage anew."""
    ep, etp = config.parallel.ep, tp if config.parallel.etp is None else config.parallel.etp
    if ep >= 1 and etp >= 1 and stage_ranks % (ep * etp):
        yield Violation(
            ("parallel.ep", "parallel.etp"),
            f"the {stage_ranks} ranks of a pipeline stage are not divisible by ep x etp = {ep} x {etp} = {ep * etp} (etp is tp "
            "where it is null); choose ep and etp whose product divides them",
        )


_CHECKS: tuple[Callable[[Config], Iterator[Violation]], ...] = (
    _bounds,
    _run,
    _tiny,
    _arithmetic,
    _data,
    _reward,
    _rollout,
    _sglang,
    _objective,
    _clip_range,
    _train,
    _parallel,
)
