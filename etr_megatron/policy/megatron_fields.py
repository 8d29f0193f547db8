"""`train.megatron` as arguments of Megatron's configs, and Megatron's complaints about them as messages to the user."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megatron.core.transformer.enums import AttnBackend

from etr_megatron.config import Config
from etr_megatron.config.megatron_fields import FIELDS, Owner, needs_gpu
from etr_megatron.errors import UserError


def fields_of(owner: Owner, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that belong to one of Megatron's configs, with values of Megatron's types."""
    return {name: _megatron_value(name, value) for name, value in fields.items() if FIELDS[name].of == owner}


def _megatron_value(name: str, value: Any) -> Any:
    if name == "attention_backend":
        return AttnBackend[value]
    return list(value) if isinstance(value, tuple) else value


def without_gpu(config: Config) -> Config:
    """The config without the fields that need a GPU. None of them changes a parameter, and a model that is only counted can be
    built without them on any machine."""
    fields = dict(config.train.megatron)
    if isinstance(modules := fields.get("recompute_modules"), tuple):
        fields["recompute_modules"] = tuple(name for name in modules if name != "moe_act")
    fields = {name: value for name, value in fields.items() if not needs_gpu(name, value)}
    return replace(config, train=replace(config.train, megatron=fields))


@contextmanager
def complaints_about(fields: Mapping[str, Any]) -> Iterator[None]:
    """Turn what Megatron raises inside the block into a UserError, if there are fields that it may be about."""
    try:
        yield
    except (AssertionError, ImportError, NotImplementedError, ValueError) as error:
        if not fields:
            raise
        # Some of Megatron's assertions have no text, but their line says what was expected.
        said = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        shown = json.dumps(dict(fields), ensure_ascii=False)
        raise UserError(
            f"train.megatron = {shown}: Megatron refuses it: {said.rstrip('.')}; change or remove a field"
        ) from error
