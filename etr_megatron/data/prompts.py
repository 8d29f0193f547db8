"""Turn a prompt's text into token ids for the engine."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from etr_megatron.config.schema import DataConfig
from etr_megatron.data.columns import Messages
from etr_megatron.errors import UserError
from etr_megatron.types import TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "{prompt}"


def load_tokenizer(path: str | Path, *, named: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a HuggingFace directory; never uses the network. named: the key that gave the path, for messages.

    Raises:
        UserError: no such directory, no tokenizer in it, or one that encodes text to nothing.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{named}: there is no directory {str(path)!r}; give a HuggingFace checkpoint directory, or tiny")
    # Without its files, transformers 5 silently creates an empty tokenizer of the class that config.json suggests.
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{named}: {str(path)!r} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's "
            "tokenizer files there"
        )
    from transformers import AutoTokenizer  # takes two seconds, not needed to only read problems

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # damaged files surface as OSError, ValueError, KeyError or tokenizers' bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{named}: the tokenizer in {str(path)!r} cannot be loaded ({type(error).__name__}: {reason}); copy the model's "
            "tokenizer files again"
        ) from error
    if not tokenizer.encode("12 + 7", add_special_tokens=False):
        raise UserError(
            f"{named}: the tokenizer in {str(path)!r} loads as {type(tokenizer).__name__} and encodes text to no tokens; its "
            "files do not match the model type in config.json"
        )
    return tokenizer


def conversation(prompt: str | Messages, config: DataConfig) -> Messages:
    """The messages that ask for a response: a problem's text in `data.prompt_template`, or chat messages unchanged, which have
    their instructions already. `data.system_prompt` comes first unless the messages begin with a system message.

    Other braces in the template (`\\boxed{}`) are kept.

    Raises:
        UserError: the template lacks `{prompt}`.
    """
    if _PLACEHOLDER not in config.prompt_template:
        raise UserError(f"data.prompt_template {config.prompt_template!r} lacks {_PLACEHOLDER}; add it where the problem goes")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": config.prompt_template.replace(_PLACEHOLDER, prompt)}]
    if config.system_prompt is None or prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": config.system_prompt}, *prompt]


def tokenize_prompts(
    conversations: Sequence[Messages], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each conversation, in one batch: 7,000 prompts take about a second.

    With the tokenizer's chat template (and `data.chat_template`) they end where the assistant's turn begins; without it they
    are the user's message with the tokenizer's default special tokens.

    Raises:
        UserError: the chat template refuses the messages or does not read an argument, or several messages have no template.
    """
    if not conversations:
        return []
    if not (config.chat_template and tokenizer.chat_template):
        without = "no chat template applies (data.chat_template is false, or the tokenizer has none)"
        if config.chat_template_kwargs:
            raise UserError(f"data.chat_template_kwargs is set but {without}: remove it")
        if config.system_prompt is not None:
            raise UserError(f"data.system_prompt is set but {without}: put it into data.prompt_template")
        if any(len(messages) > 1 for messages in conversations):
            raise UserError(f"a prompt has several chat messages but {without}: merge them into one text")
        return tokenizer([messages[0]["content"] for messages in conversations])["input_ids"]
    _check_arguments(config.chat_template_kwargs, tokenizer)
    try:
        texts = tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=True, tokenize=False, **config.chat_template_kwargs
        )
    except TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template refuses the prompts ({error}): drop data.system_prompt, or fix the data's chat "
            "messages, or set data.chat_template=false"
        ) from error
    # The template has already added the special tokens.
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _check_arguments(arguments: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for arguments that are transformers' own, or whose names are nowhere in the template, which would pass
    over them in silence."""
    template = tokenizer.get_chat_template()
    own = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in arguments:
        if name in own or not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(
                f"data.chat_template_kwargs: {name!r} is not an argument of the tokenizer's chat template; remove it"
            )
