"""Problems and their verifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Prompts and reference answers."""

    train: dict[str, str] | str = "arithmetic"
    """`arithmetic`; a .jsonl or .parquet file; or a hub dataset, by name (`name` or `name:config`) or as a local directory. A
    name may end in a split, as `name@split`. For several sets, give a mapping from names: `{gsm8k: a.jsonl, math: b.parquet}`;
    an epoch has every problem of each set once."""
    train_weights: dict[str, float] = field(default_factory=dict)
    """Shares of the prompts by training set, such as `{gsm8k: 1, math: 3}`; only their ratios count. Each set then has its own
    epochs, and a small set repeats more often, but no problem comes twice in a step. Without weights, the problems of all sets
    are one collection."""
    train_split: str = "train"
    """Split of hub datasets in `train` that are given without `@split`."""
    eval: dict[str, str] | str | None = "arithmetic"
    """Held-out problems, given like `train`; null is none."""
    eval_split: str = "test"
    """Split of hub datasets in `eval` that are given without `@split`."""
    prompt_column: tuple[str, ...] | str = "question"
    """Column with the problem: text, or a list of chat messages that ends with the user's. `outer.inner` is a field of a
    nested column. Of several names, such as `[question, problem]`, the first that the data has is used."""
    answer_column: tuple[str, ...] | str = "answer"
    """Column with the reference answer (text or a number), given like `prompt_column`."""
    id_column: tuple[str, ...] | str | None = None
    """Column with a stable id, given like `prompt_column`; null uses `<file>:<line>`."""
    prompt_template: str = "{prompt}"
    """Wraps the problem's text before the chat template is applied. Chat messages are taken as they are."""
    system_prompt: str | None = None
    """System message for the chat template, for prompts without one."""
    chat_template: bool = True
    """Apply the tokenizer's chat template if it has one."""
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of the chat template, such as `{enable_thinking: false}` for Qwen3."""
    tools: str | None = None
    """JSON file with a list of tool schemas for the chat template, which describes them in the prompt."""
    max_prompt_tokens: int = 1024
    """Longer prompts are skipped and counted."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """If a row cannot be read: stop and name its file and line, or skip and count it."""
    shuffle: bool = True
    """Shuffle the problems, those of all sets together, anew for every epoch, seeded by `run.seed`."""


@dataclass(frozen=True)
class ArithmeticConfig:
    """Generated arithmetic (`data.train: arithmetic`), used for the tiny policy's warm start and then for RL."""

    min_digits: int = 3
    """Minimum digits of an operand."""
    max_digits: int = 3
    """Maximum digits of an operand."""
    operators: tuple[str, ...] = ("+",)
    """Any of `+`, `-`, `*`. Differences are never negative; the second operand of `*` has one digit."""
    train_problems: int = 4096
    """Problems for RL."""
    eval_problems: int = 128
    """Held-out problems, disjoint from those of RL and the warm start."""
    seed: int = 0
    """Seed of the generator, independent of `run.seed`."""


@dataclass(frozen=True)
class EnvironmentConfig:
    """What answers the model between its turns: tools, a simulated user, a game."""

    function: str | None = None
    """Your function as `package.module:function`, called as `f(messages, answer, columns)` after each of the model's turns.
    `messages` are all chat messages so far, the last one the model's; `columns` is a dict of `reward.columns`. It returns the
    reply, as text, a message or a list of messages (dicts of `role` and `content`), or None, which ends the response. It may
    be an `async def`. A call that raises or returns anything else ends the response. null: a response is a single turn."""
    max_turns: int = 8
    """Maximum turns of the model. A response that would continue after them counts as truncated (finish reason `length`)."""
    role: str = "user"
    """Role of a reply that is returned as text: `user`, `tool`, or another one of the tokenizer's chat template."""
    workers: int = 8
    """Processes that call the function, each for one response at a time, or up to `concurrency` if it is an `async def`."""
    concurrency: int = 64
    """Calls of an `async def` that a process has at a time, on one event loop."""
    timeout_s: float = 30.0
    """Wall-clock limit per call, after which the response ends without a reply. The call of an `async def` is cancelled; any
    other stuck call has its process killed and replaced."""


@dataclass(frozen=True)
class RewardConfig:
    """The verifier."""

    function: str = "math"
    """`math` (math-verify), or your own function as `package.module:function`: `f(prompt, response, answer)`.
    It returns the reward, or a dict with the reward as `score`, whose other numbers become metrics (`reward/<name>`), and may
    be an `async def` (one that asks a model to judge). A parameter named `messages` gets all chat messages (without an
    environment, the user's last one and the response). With an environment, `response` is the model's last turn."""
    columns: tuple[str, ...] = ()
    """More columns (`outer.inner` in a nested one) for your own function, which is then called as
    `f(prompt, response, answer, columns)`. `columns` is a dict; a value that a row, a whole held-out set or one of several
    training sets lacks is None."""
    extract: tuple[str, ...] = ("boxed", "hash", "last_number")
    """Where to find the answer in a response; the first hit wins: in `\\boxed{}`, after `####`, the last number."""
    range_min: float = 0.0
    """Lowest reward that the function can return. The group variance is normalised by the range up to `range_max`."""
    range_max: float = 1.0
    """Highest reward that the function can return. A reward outside the range stops the run."""
    workers: int = 2
    """Grader processes."""
    concurrency: int = 64
    """Calls of an `async def` that a process has at a time, on one event loop; others are made one after the other."""
    timeout_s: float = 10.0
    """Wall-clock limit per answer, which then counts as a timeout. The call of an `async def` is cancelled; any other stuck
    grader is killed and replaced."""
    overlong_buffer: int = 0
    """DAPO's overlong punishment: over this many last tokens before `rollout.max_response_tokens`, the trained reward falls
    linearly by `overlong_penalty`. 0 is off. The group variance is still computed from the verifier's rewards."""
    overlong_penalty: float = 1.0
    """Overlong punishment of a response of `rollout.max_response_tokens`."""
