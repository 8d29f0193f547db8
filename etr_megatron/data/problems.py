"""The problems of a run: usable rows, templated and tokenized."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

from etr_megatron.config.schema import ArithmeticConfig, DataConfig
from etr_megatron.config.sources import ARITHMETIC, Source
from etr_megatron.data.prompts import conversation, tokenize_prompts
from etr_megatron.data.rows import arithmetic_rows, read_rows
from etr_megatron.errors import UserError
from etr_megatron.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ProblemSet(Sequence[Problem]):
    """A list of problems in the order of their source, and counts of what was left out.

    problems: each with `prompt` (the user's last message), `answer`, an id unique in the set, and `prompt_ids`.
    skipped_too_long: number of prompts longer than `data.max_prompt_tokens` tokens.
    skipped_broken: number of rows left out under `data.on_bad_row: skip`.
    """

    problems: list[Problem]
    skipped_too_long: int = 0
    skipped_broken: int = 0

    def __len__(self) -> int:
        """Number of problems."""
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        """The problem at `index`, or a list of them."""
        return self.problems[index]

    def __iter__(self) -> Iterator[Problem]:
        """The problems in order."""
        return iter(self.problems)

    @classmethod
    def joined(cls, sets: Iterable[tuple[str, ProblemSet]]) -> ProblemSet:
        """The problems of several sets by name, one set after the other; see `named`."""
        pairs = list(sets)
        return cls(
            [problem for name, problems in pairs for problem in named(name, problems)],
            skipped_too_long=sum(problems.skipped_too_long for _, problems in pairs),
            skipped_broken=sum(problems.skipped_broken for _, problems in pairs),
        )

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over every problem's id, text, answer, token ids and further columns, in order."""
        digest = hashlib.sha256()
        for problem in self.problems:
            said = [problem.id, problem.prompt, problem.answer, list(problem.prompt_ids)]
            digest.update(json.dumps([*said, problem.extra] if problem.extra else said).encode())
        return digest.hexdigest()[:16]


def named(set_name: str, problems: Iterable[Problem]) -> list[Problem]:
    """The problems under ids unique over all sets, `<set>/<id>`; unchanged if the set has no name."""
    return [replace(one, id=f"{set_name}/{one.id}") if set_name else one for one in problems]


def set_of(problem_id: str) -> str:
    """The name of a problem's set, from an id that `named` has made."""
    return problem_id.partition("/")[0]


def open_problems(
    source: Source,
    config: DataConfig,
    arithmetic: ArithmeticConfig,
    tokenizer: PreTrainedTokenizerBase,
    extra: tuple[str, ...] = (),
    *,
    with_messages: bool = False,
) -> ProblemSet:
    """Read a source, apply the templates, tokenize, and leave out what is broken or too long.

    extra: `reward.columns`, to be kept in the problems. with_messages: keep the chat messages, for an environment.

    Raises:
        UserError: `read_rows` or `tokenize_prompts` raised it, or no problem is left.
    """
    is_generated = source.location == ARITHMETIC
    rows = arithmetic_rows(arithmetic, source.split, extra) if is_generated else read_rows(source, config, extra)
    conversations = [conversation(row.prompt, config) for row in rows.good]
    problems, too_long = [], 0
    for row, messages, ids in zip(rows.good, conversations, tokenize_prompts(conversations, config, tokenizer), strict=True):
        if len(ids) > config.max_prompt_tokens:
            too_long += 1
            continue
        kept = messages if with_messages else []
        problems.append(Problem(row.id, messages[-1]["content"], row.answer, array("i", ids), row.extra, kept))
    if not problems:
        raise UserError(
            f"{source.key}: all {too_long} prompts of {source.location!r} are longer than "
            f"data.max_prompt_tokens={config.max_prompt_tokens}; raise it"
        )
    return ProblemSet(problems, skipped_too_long=too_long, skipped_broken=rows.broken)


def refuse_unknown_tokens(problems: Sequence[Problem], vocab_size: int, model_dir: str | Path) -> None:
    """Raise UserError if a prompt has a token without an embedding: the tokenizer is another model's."""
    largest = max((max(problem.prompt_ids, default=0) for problem in problems), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"{model_dir}: the tokenizer produces token id {largest} for a prompt, but the model has only {vocab_size} tokens "
            "(vocab_size of config.json); copy this model's tokenizer files there"
        )
