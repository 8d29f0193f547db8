"""The quick part of `checks.py`, for a config that is invalid: a user then learns all mistakes at once, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from etr_megatron.check_functions import check_environment, check_loss, check_reward
from etr_megatron.checks import (
    check_context,
    check_description,
    check_directory,
    check_replay,
    check_source,
    check_tokenizer_files,
)
from etr_megatron.config import EVALUATED, Config, InvalidConfigError, Source, sources_of
from etr_megatron.observe import require_wandb
from etr_megatron.platform.files import problems_of

_MAX_FILE_BYTES = 16 * 2**20
"""Largest data file whose rows are checked; it takes about a second."""

_COLUMNS = ("data.prompt_column", "data.answer_column", "data.id_column", "reward.columns")


@contextmanager
def adding_input_problems() -> Iterator[None]:
    """Extend an InvalidConfigError raised inside the block with the problems of the config's inputs.

    Runs only quick checks, so that a user with a misspelled key does not wait until a large model or data set is read. Skips
    checks that depend on a wrong key.
    """
    try:
        yield
    except InvalidConfigError as error:
        checks = _quick_checks(error.config)
        problems = problems_of(check for check, keys in checks if error.unreliable_keys.isdisjoint(keys))
        raise error.with_problems([line for problem in problems for line in problem.splitlines()]) from None


def _quick_checks(config: Config) -> Iterator[tuple[Callable[[], object], tuple[str, ...]]]:
    """The fast checks (or fast parts of checks) of `check_inputs`, each with the keys it depends on."""
    if config.model.path != "tiny":
        yield lambda: _check_model_files(config), ("model.path",)
        lengths = ("data.max_prompt_tokens", "rollout.max_response_tokens", "eval.max_response_tokens", *EVALUATED)
        yield lambda: check_context(check_description(config), config), ("model.path", *lengths)
    for source in sources_of(config.data):
        if source.is_file:
            yield partial(_check_file, source, config, exists=False), (f"data.{source.split}",)
            yield partial(_check_file, source, config, exists=True), (f"data.{source.split}", "data.on_bad_row", *_COLUMNS)
    yield lambda: check_reward(config), ("reward.function", "reward.columns")
    yield lambda: check_environment(config), ("environment.function", "rollout.replay")
    yield lambda: check_loss(config), ("objective.loss", "objective.preset")
    yield lambda: check_directory(config), ("run.dir", "run.name", "checkpoint.resume", "rollout.replay", "rollout.only")
    yield lambda: require_wandb(config), ("observe.wandb_project",)
    yield lambda: check_replay(config, 0), ("rollout.replay",)
    size = ("rollout.prompts_per_step", "rollout.samples_per_prompt", "run.steps", "reward.range_min", "reward.range_max")
    yield lambda: check_replay(config, config.run.steps), ("rollout.replay", *size)


def _check_model_files(config: Config) -> None:
    check_description(config)
    check_tokenizer_files(config)


def _check_file(source: Source, config: Config, *, exists: bool) -> None:
    """Check a data file that does not exist, or the rows of one that does and is small."""
    path = Path(source.location)
    if path.exists() == exists and not (exists and path.stat().st_size > _MAX_FILE_BYTES):
        check_source(source, config)
