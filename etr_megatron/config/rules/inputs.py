"""Rules about the run, its problems and their verifier."""

from __future__ import annotations

from collections.abc import Iterator

from etr_megatron.config.import_path import IMPORT_PATH
from etr_megatron.config.rules.violation import Violation, get
from etr_megatron.config.schema import Config

TINY_POSITIONS = 4096
"""Context of the generated policy."""

EXTRACTORS = ("boxed", "hash", "last_number")
OPERATORS = ("+", "-", "*")


def run(config: Config) -> Iterator[Violation]:
    """The run's name."""
    name = config.run.name
    if any(separator in name for separator in "/\\\0") or name in (".", ".."):
        yield Violation(("run.name",), "names a directory inside run.dir and must hold no path separator")
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
        yield Violation(("parallel.pp", "tiny.layers"), "every pipeline stage needs at least one layer", given=("model.path",))
    wanted = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if config.model.path == "tiny" and wanted > TINY_POSITIONS:
        yield Violation(
            ("data.max_prompt_tokens", "rollout.max_response_tokens"),
            f"the tiny model has a context of {TINY_POSITIONS} tokens",
            given=("model.path",),
        )


def arithmetic(config: Config) -> Iterator[Violation]:
    """The generated problems."""
    task = config.arithmetic
    if task.max_digits < task.min_digits:
        yield Violation(("arithmetic.min_digits", "arithmetic.max_digits"), "min_digits must not exceed max_digits")
    yield from names(config, "arithmetic.operators", OPERATORS)
    if "arithmetic" in (config.data.train, config.data.eval) and task.operators and 1 <= task.max_digits <= 18:
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
    for key in ("data.eval", "data.id_column"):
        if get(config, key) == "":
            yield Violation((key,), "must not be empty; null is none")
    if config.eval.samples > 1 and config.eval.temperature == 0:
        yield Violation(
            ("eval.samples", "eval.temperature"), "greedy responses to a problem are all the same; set a temperature above 0"
        )


def reward(config: Config) -> Iterator[Violation]:
    """The verifier."""
    reward = config.reward
    yield from names(config, "reward.extract", EXTRACTORS)
    if reward.function != "math" and not IMPORT_PATH.fullmatch(reward.function):
        yield Violation(("reward.function",), "must be math, or a function's import path as package.module:function")
    if reward.range_min >= reward.range_max:
        yield Violation(("reward.range_min", "reward.range_max"), "range_min must be below range_max")
    if reward.overlong_buffer > config.rollout.max_response_tokens:
        yield Violation(
            ("reward.overlong_buffer", "rollout.max_response_tokens"), "overlong_buffer must not exceed max_response_tokens"
        )


def names(config: Config, key: str, allowed: tuple[str, ...]) -> Iterator[Violation]:
    """The tuple at `key` holds names of `allowed`, each once."""
    values = get(config, key)
    unknown = [value for value in values if value not in allowed]
    if unknown:
        yield Violation((key,), f"{', '.join(unknown)} is not one of {', '.join(allowed)}")
    if len(set(values)) < len(values):
        yield Violation((key,), "must not name anything twice")
