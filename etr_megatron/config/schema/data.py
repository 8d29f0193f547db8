"""Problems and their verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Prompts and reference answers."""

    train: str = "arithmetic"
    """`arithmetic`, a .jsonl or .parquet file, or a hub dataset: its name (`name` or `name:config`) or a directory that holds
    one."""
    train_split: str = "train"
    """Split, for hub datasets."""
    eval: dict[str, str] | str | None = "arithmetic"
    """Held-out problems, named like `train`; several sets by name, as `{aime24: a.jsonl, amc23: b.jsonl}`; null for none."""
    eval_split: str = "test"
    """Split of `eval`, for hub datasets."""
    prompt_column: tuple[str, ...] | str = "question"
    """Column with the problem: text, or a list of chat messages that ends with the user's. `outer.inner` is a field of a nested
    column. Of several, as `[question, problem]`, the first that a source has."""
    answer_column: tuple[str, ...] | str = "answer"
    """Column with the reference answer, text or a number; named like `prompt_column`."""
    id_column: tuple[str, ...] | str | None = None
    """Column with a stable id, named like `prompt_column`; without it `<file>:<line>`."""
    prompt_template: str = "{prompt}"
    """Wrapped around the problem's text, or the last chat message's, before the chat template."""
    system_prompt: str | None = None
    """System message, for chat templates, of prompts that have none of their own."""
    chat_template: bool = True
    """Apply the tokenizer's chat template when it has one."""
    max_prompt_tokens: int = 1024
    """Longer prompts are skipped and counted."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that cannot be read: stop with its file and line, or skip and count it."""
    shuffle: bool = True
    """New order every epoch, from `run.seed`."""


@dataclass(frozen=True)
class ArithmeticConfig:
    """Generated arithmetic (`data.train: arithmetic`): what the tiny policy is warm-started on and then trained on by RL."""

    min_digits: int = 3
    """Fewest digits of an operand."""
    max_digits: int = 3
    """Most digits of an operand."""
    operators: tuple[str, ...] = ("+",)
    """Which of `+`, `-`, `*` occur; differences are never negative, and `*` has a one-digit second operand."""
    train_problems: int = 4096
    """Problems for RL."""
    eval_problems: int = 128
    """Held-out problems, disjoint from RL and warm start."""
    seed: int = 0
    """Seeds the generator, apart from `run.seed`."""


@dataclass(frozen=True)
class RewardConfig:
    """The verifier."""

    function: str = "math"
    """`math` (math-verify), or `package.module:function` of your own: `f(prompt, response, answer) -> float`."""
    columns: tuple[str, ...] = ()
    """Further columns of the data (`outer.inner` in a nested one) for a function of your own, which is then called as
    `f(prompt, response, answer, columns)` with a dict of them; null where a row, or a whole held-out set, has none."""
    extract: tuple[str, ...] = ("boxed", "hash", "last_number")
    """Where the answer is looked for, first hit wins: `\\boxed{}`, after `####`, the last number."""
    range_min: float = 0.0
    """Lowest reward the function can give; with `range_max` it normalises the group variance."""
    range_max: float = 1.0
    """Highest reward the function can give; one outside of the two stops the run."""
    workers: int = 2
    """Grader processes."""
    timeout_s: float = 10.0
    """Wall-clock limit per answer; a stuck grader is killed and replaced, and the answer counted as a timeout."""
    overlong_buffer: int = 0
    """DAPO's overlong punishment: over the last so many tokens before `rollout.max_response_tokens` the trained reward falls
    linearly by `overlong_penalty`; 0 is off. The group variance stays the verifier's."""
    overlong_penalty: float = 1.0
    """What a response of `rollout.max_response_tokens` loses to the overlong punishment."""
