"""Tokenizes an environment's replies, with the template's tokens between a turn of the model and the next one."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from etr_megatron.config.schema import DataConfig
from etr_megatron.errors import UserError
from etr_megatron.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURN = "TURN-OF-THE-MODEL"
"""Placeholder for the model's turn when a template is rendered. The text after it lies between this turn and the next."""


class ReplyTokenizer:
    """Tokenizes replies.

    Earlier tokens are never tokenized anew: decoding and encoding do not always give the tokens that the model drew, and some
    templates change earlier turns (Qwen3's drops their thoughts).
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> None:
        """stop_ids: tokens that end a turn of the model."""
        self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
        self._template = template_arguments(config) if config.chat_template and tokenizer.chat_template else None

    def __call__(self, reply: Sequence[Message], last: int) -> list[int]:
        """The tokens between a turn that ended with the token `last` and the next turn: the chat template's rendering of the
        reply or, without a template, the reply's texts as they are.

        If `last` is a stop token, the template's end-of-turn token is left out, with blanks before it (Llama 2 has one): the
        model has already drawn this token, or another one in its place (`<|eom_id|>` of Llama 3.1).

        Raises UserError if the chat template refuses the messages, or does not show the model's turn.
        """
        if self._template is None:
            return self._encode("".join(message["content"] for message in reply))
        ids = self._encode(self._after_a_turn(reply))
        end = next((place for place, one in enumerate(ids) if one in self._stop_ids), None) if last in self._stop_ids else None
        return ids if end is None or self._tokenizer.decode(ids[:end]).strip() else ids[end + 1 :]

    def _encode(self, text: str) -> list[int]:
        # verbose=False: else transformers warns of "indexing errors" for a long reply, which merely ends its response.
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _after_a_turn(self, reply: Sequence[Message]) -> str:
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _TURN}]
        roles = ", ".join(dict.fromkeys(message["role"] for message in reply))
        try:
            text = self._tokenizer.apply_chat_template(
                [*before, *reply], add_generation_prompt=True, tokenize=False, **(self._template or {})
            )
        except TemplateError as error:
            raise UserError(
                f"the tokenizer's chat template refuses a reply of role {roles} ({error}): change environment.role, or what "
                "environment.function returns"
            ) from error
        _, found, after = text.partition(_TURN)
        if not found:
            raise UserError(
                f"the tokenizer's chat template leaves out a turn of the model before a reply of role {roles}: change "
                "environment.role, or set data.chat_template=false"
            )
        return after


def template_arguments(config: DataConfig) -> dict[str, Any]:
    """The arguments that the chat template gets besides the messages. Raises UserError as `read_tools` does."""
    tools = {} if config.tools is None else {"tools": read_tools(config.tools)}
    return {**config.chat_template_kwargs, **tools}


def read_tools(path: str) -> list[dict[str, Any]]:
    """The tool schemas of `data.tools`. Raises UserError if there is no such file, or no list of objects in it."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise UserError(f"data.tools: {path} is not readable as JSON ({error}); give a list of tool schemas there") from error
    if not isinstance(found, list) or not found or not all(isinstance(tool, dict) for tool in found):
        raise UserError(f"data.tools: {path} must hold a JSON list of at least one tool schema, each an object")
    return found
