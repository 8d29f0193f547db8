"""A `Config` as plain data and as YAML, the inverse of loading."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from etr_megatron.config.schema import Config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Section -> key -> plain value (tuples become lists), ready for YAML or JSON."""
    return {section: {key: _plain(value) for key, value in values.items()} for section, values in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def dump_yaml(config: Config) -> str:
    """YAML text from which `load_config` builds an equal `Config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
