"""Checks that the lines of a recorded step are well-formed: people copy, truncate and edit these files.

Every function raises ValueError saying what is wrong.
"""

from __future__ import annotations

import base64
from array import array
from typing import Any

Kinds = dict[str, type | tuple[type, ...]]

_HEAD: Kinds = {"counts": dict}
_GROUP: Kinds = {"id": str, "problem": dict, "samples": list}
_PROBLEM: Kinds = {"id": str, "prompt": str, "answer": str, "prompt_ids": list}
_SAMPLE: Kinds = {
    "index": int,
    "response_ids": list,
    "rollout_logprobs": list,
    "finish_reason": str,
    "weight_version": int,
    "text": str,
    "reward": (int, float),
    "reward_status": str,
    "weight_versions": list,
}


def check_head(head: Any) -> None:
    """Check the first line."""
    _check_keys("the head", head, _HEAD)
    if not all(isinstance(count, int | float) for count in head["counts"].values()):
        raise ValueError("`counts` has a value that is not a number")


def check_group(group: Any) -> None:
    """Check any other line."""
    _check_keys("a group", group, _GROUP)
    problem = group["problem"]
    _check_keys("a problem", problem, _PROBLEM)
    if not isinstance(problem.get("extra", {}), dict):  # missing in records of older versions
        raise ValueError(f"`extra` of a problem must be dict, not {type(problem['extra']).__name__}")
    _check_messages(problem, "a problem")
    if more := sorted(problem.keys() - {*_PROBLEM, "extra", "messages"}):
        raise ValueError(f"a problem has the unknown key `{more[0]}`")
    _check_numbers(problem, "prompt_ids", "i")
    if not group["samples"]:
        raise ValueError("`samples` is empty")
    for sample in group["samples"]:
        _check_sample(sample)


def _check_sample(sample: Any) -> None:
    _check_keys("a sample", sample, _SAMPLE)
    tokens = len(sample["response_ids"])
    _check_numbers(sample, "response_ids", "i")
    _check_numbers(sample, "rollout_logprobs", "d", tokens)
    if sample["weight_versions"]:
        _check_numbers(sample, "weight_versions", "i", tokens)
    parts = sample.get("reward_parts", {})  # missing in records of older versions
    if not isinstance(parts, dict) or not all(isinstance(part, int | float) for part in parts.values()):
        raise ValueError("`reward_parts` of a sample is not a mapping of names to numbers")
    if "routing" in sample:
        _check_routing(sample["routing"])
    _check_messages(sample, "a sample")
    if not isinstance(sample.get("environment_status"), str | None):
        raise ValueError("`environment_status` of a sample is not a text")
    if sample.get("loss_mask"):
        _check_numbers(sample, "loss_mask", "B", tokens)
        if set(sample["loss_mask"]) - {0, 1}:
            raise ValueError("`loss_mask` has values other than 0 and 1")
    if sample.get("old_logprobs") is not None:
        _check_old_logprobs(sample, tokens)


def _check_old_logprobs(sample: dict[str, Any], tokens: int) -> None:
    """Check that the values of reply tokens, and no others, are null."""
    old, mask = sample["old_logprobs"], sample.get("loss_mask")
    if mask and isinstance(old, list) and len(old) == tokens:
        if any((one is None) == bool(is_drawn) for one, is_drawn in zip(old, mask, strict=True)):
            raise ValueError("`old_logprobs` is not null exactly where `loss_mask` is 0")
        old = [0.0 if one is None else one for one in old]
    _check_numbers({"old_logprobs": old}, "old_logprobs", "d", tokens)


def _check_messages(found: dict[str, Any], what: str) -> None:
    """Check the chat messages, which only runs with an environment have."""
    messages = found.get("messages", [])
    if not isinstance(messages, list) or not all(_is_message(one) for one in messages):
        raise ValueError(f"`messages` of {what} is not a list of objects with the texts `role` and `content`")


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)


def _check_routing(found: Any) -> None:
    try:
        base64.b64decode(found, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`routing` is not base64 ({error})") from error


def _check_keys(what: str, found: Any, kinds: Kinds) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not a JSON object")
    for key, kind in kinds.items():
        if key not in found:
            raise ValueError(f"`{key}` is missing in {what}")
        if not isinstance(found[key], kind):
            wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"`{key}` of {what} must be {wanted}, not {type(found[key]).__name__}")


def _check_numbers(found: dict[str, Any], key: str, code: str, count: int | None = None) -> None:
    """Check that the values fit into an array of type `code` and that there are `count` of them."""
    try:
        numbers = array(code, found[key])
    except (TypeError, OverflowError) as error:
        raise ValueError(f"`{key}` is not a list of numbers ({error})") from error
    if count is not None and len(numbers) != count:
        raise ValueError(f"`{key}` has {len(numbers)} values for {count} tokens")
