"""The training and held-out problems of a run, the same on every rank."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from etr_megatron.config import Config, Source, sources_of
from etr_megatron.data import ProblemSet, columns_without_values, open_problems, refuse_columns_of_no_set
from etr_megatron.errors import UserError
from etr_megatron.evaluation import HeldOut
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.rollout.rank0 import on_rank0
from etr_megatron.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_sets(config: Config, tokenizer: PreTrainedTokenizerBase, *, report: bool) -> tuple[ProblemSet, HeldOut]:
    """The problems of `data.train` and `data.eval`. A collective. report: whether to print skipped rows and missing columns.

    Raises UserError where `open_problems` or `refuse_other_problems` does (the former on the ranks concerned), and for a column
    of `reward.columns` that none of several training sets has.
    """
    sources = sources_of(config.data)
    found = [_problems(config, source, tokenizer, report=report) for source in sources]
    refuse_other_problems({source.key: problems for source, problems in zip(sources, found, strict=True)})
    pairs = {
        split: [(source.name, problems) for source, problems in zip(sources, found, strict=True) if source.split == split]
        for split in ("train", "eval")
    }
    _look_for_columns(config, {name: problems for name, problems in pairs["train"] if name}, report=report)
    return ProblemSet.joined(pairs["train"]), HeldOut.of(pairs["eval"], config.eval.problems)


def _problems(config: Config, source: Source, tokenizer: PreTrainedTokenizerBase, *, report: bool) -> ProblemSet:
    """The problems of a source; prints how many rows were skipped and why."""
    found = open_problems(
        source,
        config.data,
        config.arithmetic,
        tokenizer,
        config.reward.columns,
        with_messages=config.environment.function is not None,
    )
    if report and (found.skipped_too_long or found.skipped_broken):
        print(
            f"{source.key}: {len(found)} problems; left out {found.skipped_too_long} over data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens} and {found.skipped_broken} broken rows",
            file=sys.stderr,
        )
    return found


def _look_for_columns(config: Config, train: Mapping[str, Sequence[Problem]], *, report: bool) -> None:
    """Print which of the named training sets have no values in a column of `reward.columns`. Raise UserError for a column that
    none of them has."""
    columns = config.reward.columns
    without = {name: columns_without_values((one.extra for one in problems), columns) for name, problems in train.items()}
    refuse_columns_of_no_set(without, columns)  # checked again, because the rows with values may have been skipped here
    for column in columns:
        lacking = [name for name, missing in without.items() if column in missing]
        if lacking and report:
            print(f"data.train: no values in a column {column!r} (reward.columns) of {', '.join(lacking)}", file=sys.stderr)


def refuse_other_problems(found: Mapping[str, ProblemSet]) -> None:
    """Raise UserError on every rank if the problems of any rank differ from rank 0's. Such a rank would train on its own
    prompts with the rewards of other prompts. A collective. found: the problems by config key."""
    mine = {key: problems.fingerprint for key, problems in found.items()}
    host, wanted = on_rank0(lambda: (socket.gethostname(), mine))

    def compare() -> None:
        for key in mine:
            if mine[key] != wanted[key]:
                raise UserError(
                    f"{key}: {socket.gethostname()} reads different problems from {host}, the machine of rank 0; give both the "
                    "same data and tokenizer files"
                )

    on_all_ranks(compare)
