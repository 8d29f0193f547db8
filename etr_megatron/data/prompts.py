"""Turn a prompt's text into token ids for the engine."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from etr_megatron.config.schema import Config, DataConfig
from etr_megatron.data.columns import Messages
from etr_megatron.data.replies import ReplyTokenizer, read_tools, template_arguments
from etr_megatron.errors import UserError
from etr_megatron.platform.files import refuse_all
from etr_megatron.types import TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "{prompt}"
_WITHOUT_TEMPLATE = "no chat template applies (data.chat_template is false, or the tokenizer has none)"


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
    """The messages that ask for a response: a problem's text in `data.prompt_template`, or chat messages unchanged, because
    they already contain their instructions. `data.system_prompt` comes first unless the messages begin with a system message.

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
    _check_arguments(config, tokenizer)
    if not (config.chat_template and tokenizer.chat_template):
        if config.system_prompt is not None:
            raise UserError(f"data.system_prompt is set but {_WITHOUT_TEMPLATE}: put it into data.prompt_template")
        if any(len(messages) > 1 for messages in conversations):
            raise UserError(f"a prompt has several chat messages but {_WITHOUT_TEMPLATE}: merge them into one text")
        return tokenizer([messages[0]["content"] for messages in conversations])["input_ids"]
    try:
        texts = tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=True, tokenize=False, **template_arguments(config)
        )
    except TemplateError as error:
        change = "data.chat_template_kwargs, " if config.chat_template_kwargs else ""
        raise UserError(
            f"the tokenizer's chat template refuses the prompts ({error}): change {change}data.system_prompt or the data's "
            "chat messages, or set data.chat_template=false"
        ) from error
    # The template has already added the special tokens.
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _check_arguments(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a name in `data.chat_template_kwargs` that the job itself sets, or that does not occur in the
    template, which would silently ignore it; the same for `data.tools`."""
    for key in ("chat_template_kwargs", "tools"):
        if getattr(config, key) and not (config.chat_template and tokenizer.chat_template):
            raise UserError(f"data.{key} is set but {_WITHOUT_TEMPLATE}: remove it")
    if not (config.chat_template_kwargs or config.tools):
        return
    template = tokenizer.get_chat_template(tools=[] if config.tools else None)
    if config.tools and not re.search(r"\btools\b", template):
        raise UserError("data.tools is set, but the tokenizer's chat template describes no tools: remove it")
    own = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in config.chat_template_kwargs:
        if name in own:
            instead = "give them in data.tools" if name == "tools" else "remove it"
            raise UserError(f"data.chat_template_kwargs: {name!r} is set by the job; {instead}")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(
                f"data.chat_template_kwargs: {name!r} is not an argument of the tokenizer's chat template; remove it"
            )


def stop_token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `rollout.stop_tokens`. Raises UserError for a text that is not one token."""
    found = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1 or (ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token):
            raise UserError(
                f"rollout.stop_tokens: {text!r} is not a token of the model's tokenizer; name single tokens by their text"
            )
        found.append(ids[0])
    return found


def check_tokenizer(config: Config) -> None:
    """Check the config's settings against the tokenizer, before a job starts. If the model does not exist, as `tiny` before its
    first build, only `data.tools` is read. Raises UserError with every problem."""
    data, environment = config.data, config.environment
    if data.tools is not None:
        read_tools(data.tools)
    if not Path(config.model.path).is_dir():
        return
    if not (config.rollout.stop_tokens or data.chat_template_kwargs or data.tools or environment.function):
        return
    tokenizer = load_tokenizer(config.model.path)
    refuse_all(
        lambda: stop_token_ids(config.rollout.stop_tokens, tokenizer),
        lambda: _check_arguments(data, tokenizer),
        lambda: ReplyTokenizer(data, tokenizer, ())([{"role": environment.role, "content": "-"}], -1),
    )
