"""A readable view of a recorded rollout, with the gap between the engine's and the trainer's log-prob of every token that the
model generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from etr_megatron.errors import UserError
from etr_megatron.observe.run_directory import RunDirectory
from etr_megatron.rollout.record import read_record

Pieces = Callable[[list[int]], list[str]]
"""Maps token ids to the text of each."""


def listing(run: Path, step: int) -> str:
    """The samples of a recorded step, one per line. Raises UserError if the step was not recorded."""
    lines = []
    for group in read_record(RunDirectory(run).recorded, step)[0]:
        for sample in group["samples"]:
            facts = f"reward {sample['reward']:g}, {_token_counts(sample)}, {sample['finish_reason']}"
            lines.append(f"{group['id']}/{sample['index']}  {facts}")
    return "\n".join(lines)


def view(run: Path, step: int, name: str, pieces: Pieces | str) -> str:
    """The sample `name` (`<group>/<index>`, as in `listing`) of a recorded step.

    pieces: maps token ids to texts, or the reason why that is not possible; then only ids and the reason are shown. Raises
    UserError if the step or the sample does not exist.
    """
    for group in read_record(RunDirectory(run).recorded, step)[0]:
        for sample in group["samples"]:
            if f"{group['id']}/{sample['index']}" == name:
                missing = [f"tokens are shown without text: {pieces}"] if isinstance(pieces, str) else []
                return "\n".join([*_facts(name, group["problem"], sample), "", *missing, *_tokens(sample, pieces)])
    raise UserError(f"step {step} of {run} has no sample {name}; leave out --sample to list the samples")


def _facts(name: str, problem: dict[str, Any], sample: dict[str, Any]) -> list[str]:
    old = sample.get("old_logprobs") or [None] * len(sample["response_ids"])
    pairs = zip(sample["rollout_logprobs"], old, strict=True)
    gaps = {place: abs(a - b) for place, (a, b) in enumerate(pairs) if b is not None}
    gap = "the trainer's log-probs were not recorded"
    if gaps:
        worst = max(gaps, key=lambda place: gaps[place])
        gap = f"mean {sum(gaps.values()) / len(gaps):.1e}, largest {gaps[worst]:.1e} at token {worst}"
    parts = [f"{part} {value:g}" for part, value in sample.get("reward_parts", {}).items()]
    return [
        f"sample        {name}",
        f"reward        {sample['reward']:g} ({', '.join([sample['reward_status'], *parts])})",
        f"finish        {sample['finish_reason']}, {_token_counts(sample)}",
        *([f"environment   {sample['environment_status']}"] if sample.get("environment_status") else []),
        f"log-prob gap  {gap}",
        f"answer        {problem['answer']}",
        "prompt",
        *_indented(problem["prompt"]),
        *_response(sample),
    ]


def _token_counts(sample: dict[str, Any]) -> str:
    text, mask = f"{len(sample['response_ids'])} tokens", sample.get("loss_mask")
    return f"{text} ({len(mask) - sum(mask)} of replies)" if mask else text


def _response(sample: dict[str, Any]) -> list[str]:
    """The model's turns and the replies by their roles, or the text of a response without an environment."""
    messages = sample.get("messages") or [{"role": "response", "content": sample["text"]}]
    return [line for message in messages for line in (message["role"], *_indented(message["content"]))]


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines() or [""]]


def _tokens(sample: dict[str, Any], pieces: Pieces | str) -> list[str]:
    ids = sample["response_ids"]
    texts = [""] * len(ids) if isinstance(pieces, str) else [repr(text) for text in pieces(ids)]
    versions = sample["weight_versions"] or [sample["weight_version"]] * len(ids)
    old = sample.get("old_logprobs") or [None] * len(ids)
    width = max([4, *map(len, texts)])
    lines = [f"token       id  {'text':{width}}  weights     engine    trainer        gap"]
    mask = sample.get("loss_mask") or [1] * len(ids)
    for place, (token, text, version, engine, trainer, is_drawn) in enumerate(
        zip(ids, texts, versions, sample["rollout_logprobs"], old, mask, strict=True)
    ):
        if not is_drawn:
            lines.append(f"{place:5d} {token:8d}  {text:{width}}    reply")
            continue
        compared = "" if trainer is None else f" {trainer:10.4f} {abs(engine - trainer):10.1e}"
        lines.append(f"{place:5d} {token:8d}  {text:{width}}  {version:7d} {engine:10.4f}{compared}")
    return lines


def tokenizer_pieces(run: Path) -> Pieces | str:
    """Pieces from the tokenizer of the run's model; a sentence with the reason if it cannot be loaded any more."""
    from etr_megatron.config import load_config, path_of_run
    from etr_megatron.data import load_tokenizer, tiny_policy_path

    try:
        config = load_config(RunDirectory(run).config_file, [])
        name = tiny_policy_path(config.tiny, config.arithmetic) if config.model.path == "tiny" else config.model.path
        path = path_of_run(name, run, config)
        if not path.is_dir():
            return f"the run's model.path, {path}, no longer exists"
        tokenizer = load_tokenizer(path)
    except (UserError, OSError, ValueError, yaml.YAMLError) as error:
        return " ".join(str(error).split())
    return lambda ids: [tokenizer.decode([token]) for token in ids]
