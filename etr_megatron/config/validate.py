"""Constraints on the values of a `Config`: pure functions that return every violation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from etr_megatron.config.defaults import fill_objective
from etr_megatron.config.presets import PRESETS
from etr_megatron.config.rules import RULES, WARNING_RULES, Violation, get, parallel
from etr_megatron.config.rules.violation import without_entry
from etr_megatron.config.schema import Config


def validate(config: Config, world_size: int | None) -> list[str]:
    """Every violated constraint as `key = value: constraint`; includes layout constraints if `world_size` is given."""
    return [render(violation, config) for violation in violations(config, world_size)]


def config_warnings(config: Config) -> list[str]:
    """Settings that are allowed but probably unintended, in the form of `validate`."""
    filled = replace(config, objective=fill_objective(config.objective))
    return [render(found, config) for rule in WARNING_RULES for found in rule(filled)]


def violations(config: Config, world_size: int | None = None) -> list[Violation]:
    """Every violated constraint of `config`; null objective fields are checked with the preset's values."""
    config = replace(config, objective=fill_objective(config.objective))
    found: list[Violation] = []
    for rule in RULES:
        found.extend(rule(config))
    if world_size is not None:
        found.extend(parallel.layout(config, world_size))
    return found


def depends_on(violation: Violation, config: Config) -> set[str]:
    """The keys whose values cause the violation, including the preset if it sets one of them."""
    keys = {without_entry(key) for key in (*violation.keys, *violation.given)}
    is_inherited = any(key.startswith("objective.") and get(config, key) is None for key in keys)
    return keys | ({"objective.preset"} if is_inherited else set())


def wrong_keys(found: Iterable[Violation]) -> set[str]:
    """The keys whose value is wrong regardless of the others."""
    return {without_entry(one.keys[0]) for one in found if len(one.keys) == 1}


def render(violation: Violation, config: Config, sources: Mapping[str, str] | None = None) -> str:
    """One sentence: `key = value (source), ...: constraint`. sources: key -> where its value was set."""
    filled = replace(config, objective=fill_objective(config.objective))
    parts = []
    for key in violation.keys:
        source = ""
        if sources is not None:
            section, name = without_entry(key).split(".")
            from_preset = section == "objective" and getattr(config.objective, name) is None
            inherited = name in PRESETS[config.objective.preset] and from_preset
            written = sources.get(key) or sources.get(without_entry(key))
            source = f" ({written or (f'preset {config.objective.preset}' if inherited else 'default')})"
        parts.append(f"{key} = {json.dumps(get(filled, key), ensure_ascii=False)}{source}")
    return f"{', '.join(parts)}: {violation.message}"
