"""Prompts with verifiable answers: sources, templates and the resumable cursor; also the tiny policy and its arithmetic."""

from etr_megatron.data.blend import AnyCursor, BlendedCursor
from etr_megatron.data.columns import columns_without_values, refuse_columns_of_no_set
from etr_megatron.data.cursor import PromptCursor
from etr_megatron.data.problems import ProblemSet, named, open_problems, refuse_unknown_tokens, set_of
from etr_megatron.data.prompts import check_tokenizer, load_tokenizer, stop_token_ids
from etr_megatron.data.replies import ReplyTokenizer
from etr_megatron.data.rows import usable_rows
from etr_megatron.data.tiny import build_tiny_policy, tiny_policy_path

__all__ = [
    "AnyCursor",
    "BlendedCursor",
    "ProblemSet",
    "PromptCursor",
    "ReplyTokenizer",
    "build_tiny_policy",
    "check_tokenizer",
    "columns_without_values",
    "load_tokenizer",
    "named",
    "open_problems",
    "refuse_columns_of_no_set",
    "refuse_unknown_tokens",
    "set_of",
    "stop_token_ids",
    "tiny_policy_path",
    "usable_rows",
]
