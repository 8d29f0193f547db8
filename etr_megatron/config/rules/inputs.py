"""Rules about the run, its problems and the verifier."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields

from etr_megatron.config.defaults import EVALUATED, response_limits
from etr_megatron.config.import_path import IMPORT_PATH
from etr_megatron.config.rules.violation import Violation, get
from etr_megatron.config.schema import Config
from etr_megatron.config.sources import ARITHMETIC, samples_of_set, sets_by_name, sources_of

TINY_POSITIONS = 4096
"""Context length of the tiny policy in tokens."""

_SET_NAME = re.compile(r"[\w.-]+", re.ASCII)

EXTRACTORS = ("boxed", "hash", "last_number")
OPERATORS = ("+", "-", "*")


def run(config: Config) -> Iterator[Violation]:
    """The run's name."""
    name = config.run.name
    if any(separator in name for separator in "/\\\0") or name in (".", ".."):
        yield Violation(("run.name",), "must be a plain directory name without path separators, and neither . nor ..")
    if name != name.strip():
        yield Violation(("run.name",), "must not begin or end with a space")


def tiny(config: Config) -> Iterator[Violation]:
    """The generated policy."""
    tiny = config.tiny
    if tiny.heads % 2:
        yield Violation(("tiny.heads",), "must be even, as there are half as many key/value heads")
    if tiny.head_dim % 2:
        yield Violation(("tiny.head_dim",), "must be even, as rotary embeddings turn pairs of dimensions")
    if config.model.path == "tiny" and tiny.layers < config.parallel.pp:
        yield Violation(
            ("parallel.pp", "tiny.layers"),
            "every pipeline stage needs at least one layer; lower pp or raise layers",
            given=("model.path",),
        )
    for key, tokens in response_limits(config).items():
        if config.model.path == "tiny" and config.data.max_prompt_tokens + tokens > TINY_POSITIONS:
            yield Violation(
                ("data.max_prompt_tokens", key),
                f"their sum exceeds the context of the tiny model, {TINY_POSITIONS} tokens; lower one of them",
                given=("model.path", *EVALUATED),
            )


def arithmetic(config: Config) -> Iterator[Violation]:
    """The generated problems."""
    task = config.arithmetic
    if task.max_digits < task.min_digits:
        yield Violation(("arithmetic.min_digits", "arithmetic.max_digits"), "min_digits must not exceed max_digits")
    yield from names(config, "arithmetic.operators", OPERATORS)
    is_used = any(source.location == ARITHMETIC for source in sources_of(config.data))
    if is_used and task.operators and 1 <= task.max_digits <= 18:
        possible = 10 ** (2 * task.max_digits) * len(set(task.operators))
        if possible < task.train_problems + task.eval_problems:
            yield Violation(
                ("arithmetic.train_problems", "arithmetic.eval_problems", "arithmetic.max_digits"),
                f"there are at most {possible} different problems; ask for fewer, or allow more digits",
                given=("arithmetic.operators", "data.train", "data.eval"),
            )


def data(config: Config) -> Iterator[Violation]:
    """Prompts and reference answers."""
    if "{prompt}" not in config.data.prompt_template:
        yield Violation(("data.prompt_template",), "must contain {prompt}, which stands for the problem's text")
    if config.data.chat_template_kwargs and not config.data.chat_template:
        yield Violation(
            ("data.chat_template_kwargs", "data.chat_template"), "there is no chat template to give arguments to; remove them"
        )
    for key in ("data.eval", "data.id_column"):
        if get(config, key) is not None and not get(config, key):
            yield Violation((key,), "must not be empty; use null for none")
    for key in ("data.prompt_column", "data.answer_column", "data.id_column"):
        columns = get(config, key)
        if isinstance(columns, tuple) and not all(columns):
            yield Violation((key,), "must not contain an empty name")
    for key in ("data.train", "data.eval"):
        if isinstance(sets := get(config, key), dict):
            yield from _sets(key, sets)
    yield from _weights(config)
    yield from _splits(config)
    yield from _samples(config)
    yield from _best(config)


def observation(config: Config) -> Iterator[Violation]:
    """Warnings: best checkpoints that would not be saved, and a profile that would not be made."""
    every, evaluated = config.checkpoint.every, config.eval.every
    if config.checkpoint.keep_best > 0 and evaluated and (not every or every % evaluated):
        yield Violation(
            ("checkpoint.keep_best", "checkpoint.every", "eval.every"),
            "only checkpoints of steps that are evaluated can be the best; make checkpoint.every a multiple of eval.every",
        )
    if config.observe.profile_step > config.run.steps or (config.observe.profile_step and config.rollout.only):
        yield Violation(
            ("observe.profile_step", "run.steps", "rollout.only"), "this step is not trained, so nothing is profiled"
        )


def _sets(key: str, sets: dict[str, str]) -> Iterator[Violation]:
    if wrong := [name for name in sets if not _SET_NAME.fullmatch(name)]:
        yield Violation((key,), f"the set name {wrong[0]!r} may contain only letters, digits, `_`, `-` and `.`")
    if empty := [name for name, place in sets.items() if not place]:
        yield Violation((key,), f"the set {empty[0]} has no source; give it one, or remove it")


def _weights(config: Config) -> Iterator[Violation]:
    """Shares of the training sets."""
    weights, keys = config.data.train_weights, ("data.train_weights", "data.train")
    sets = sets_by_name(config.data.train) if isinstance(config.data.train, dict) else {}
    if unknown := [name for name in weights if name not in sets]:
        yield Violation(keys, f"data.train has no set named {unknown[0]!r}")
    elif weights and (missing := [name for name in sets if name not in weights]):
        yield Violation(keys, f"the set {missing[0]} has no weight; give it one, or remove the set")
    if low := [name for name, weight in weights.items() if not 0 < weight < math.inf]:
        yield Violation(keys[:1], f"the weight of {low[0]} must be greater than 0 and finite")


def _splits(config: Config) -> Iterator[Violation]:
    """A split after `@` in the location of a source that has no splits, where it would be ignored."""
    for source in sources_of(config.data):
        key = f"data.{source.split}"
        if (given := sets_by_name(get(config, key))[source.name]) == source.location:
            continue
        if not source.location or not source.hub_split:
            yield Violation((key,), f"in {given}, the `@` must be between a hub dataset and its split")
        elif source.is_file or source.location == ARITHMETIC:
            yield Violation(
                (key,), f"{source.location} has no splits (only hub datasets have them); remove `@{source.hub_split}`"
            )


def _samples(config: Config) -> Iterator[Violation]:
    """Responses per held-out problem."""
    samples = config.eval.samples
    counts = [samples] if isinstance(samples, int) else list(samples.values())
    if any(count < 1 for count in counts):
        yield Violation(("eval.samples",), "must be at least 1")
    if any(count >= 2**31 for count in counts):
        yield Violation(("eval.samples",), "must be below 2**31")
    if any(count > 1 for count in counts) and config.eval.temperature == 0:
        yield Violation(
            ("eval.samples", "eval.temperature"),
            "greedy responses to a problem are all the same; set a temperature above 0, or samples to 1",
        )
    sets = config.data.eval if isinstance(config.data.eval, dict) else {}
    if isinstance(samples, dict) and (unknown := [name for name in samples if name not in sets]):
        yield Violation(("eval.samples", "data.eval"), f"data.eval has no set named {unknown[0]!r}")


def _best(config: Config) -> Iterator[Violation]:
    """Best checkpoints, which evaluations decide."""
    for key in ("eval.every", "data.eval"):
        if config.checkpoint.keep_best > 0 and not get(config, key):
            yield Violation(
                ("checkpoint.keep_best", key), "without evaluations no checkpoint is the best; evaluate, or set keep_best to 0"
            )
    metric, found = config.checkpoint.best_by, _eval_metrics(config)
    is_part = config.reward.function != "math" and re.fullmatch(r"eval(_|/[^/]+/)reward/.+", metric)
    if config.checkpoint.keep_best > 0 and config.data.eval and metric not in found and not is_part:
        yield Violation(
            ("checkpoint.best_by", "checkpoint.keep_best", "data.eval", "eval.samples", "reward.function"),
            f"must be one of {', '.join(found)}, or eval_reward/NAME of a number that your reward.function returns",
        )


def _eval_metrics(config: Config) -> list[str]:
    """Metrics of this run's evaluations for which higher is better."""
    sets = list(config.data.eval) if isinstance(config.data.eval, dict) else []
    places = [("eval_", any(samples_of_set(config, name) > 1 for name in sets or [""]))]
    places += [(f"eval/{name}/", samples_of_set(config, name) > 1) for name in sets]
    return [place + metric for place, several in places for metric in ("accuracy", "reward_mean", *["pass_at_k"] * several)]


def reward(config: Config) -> Iterator[Violation]:
    """The verifier."""
    reward = config.reward
    if reward.columns and reward.function == "math" and config.environment.function is None:
        yield Violation(
            ("reward.columns", "reward.function"),
            "the math reward does not use columns; remove them, or set reward.function to your own function",
            given=("environment.function",),
        )
    elif reward.columns and {source.location for source in sources_of(config.data) if source.split == "train"} == {ARITHMETIC}:
        yield Violation(
            ("reward.columns", "data.train"),
            "generated problems have no further columns; leave columns empty, or train on a dataset that has them",
            given=("reward.function", "environment.function"),
        )
    if len(set(reward.columns)) < len(reward.columns) or not all(reward.columns):
        yield Violation(("reward.columns",), "must not contain empty or duplicate names")
    yield from names(config, "reward.extract", EXTRACTORS)
    if reward.function != "math" and not IMPORT_PATH.fullmatch(reward.function):
        yield Violation(("reward.function",), "must be math, or an import path of the form package.module:function")
    if reward.range_min >= reward.range_max:
        yield Violation(("reward.range_min", "reward.range_max"), "range_min must be below range_max")
    if reward.overlong_buffer > config.rollout.max_response_tokens:
        yield Violation(
            ("reward.overlong_buffer", "rollout.max_response_tokens"), "overlong_buffer must not exceed max_response_tokens"
        )


def environment(config: Config) -> Iterator[Violation]:
    """The environment, which answers the model between its turns."""
    function = config.environment.function
    if function is not None and not IMPORT_PATH.fullmatch(function):
        yield Violation(("environment.function",), "must be an import path of the form package.module:function, or null")
    for key in fields(config.environment) if function is None else ():
        if getattr(config.environment, key.name) != key.default:
            yield Violation(
                (f"environment.{key.name}", "environment.function"), "has no effect without a function; name one, or remove it"
            )


def names(config: Config, key: str, allowed: tuple[str, ...]) -> Iterator[Violation]:
    """The tuple at `key` has unique names from `allowed`."""
    values = get(config, key)
    unknown = [value for value in values if value not in allowed]
    if unknown:
        yield Violation((key,), f"{', '.join(unknown)} is not one of {', '.join(allowed)}")
    if len(set(values)) < len(values):
        yield Violation((key,), "must not contain duplicates")
