"""The schema's docstrings as a markdown reference; `python -m etr_megatron.config` prints it."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from etr_megatron.config import schema
from etr_megatron.config.dump import to_dict
from etr_megatron.config.presets import PRESETS
from etr_megatron.config.schema import Config

_HEAD = """# Configuration

Made by `python -m etr_megatron.config`; the texts come from `etr_megatron/config/schema/`.

A config file is YAML with one mapping per section; every key may be left out. `section.key=value` on the command line
overrides it. An unknown key, a value of the wrong type or a violated constraint stops the job before anything is
started, in one message that lists all of them.
"""


def render_reference() -> str:
    """Markdown with one table (key, type, default, meaning) per section and one of the objective's presets."""
    modules = {schema, *(sys.modules[type(section).__module__] for section in vars(Config()).values())}
    nodes = [node for module in modules for node in ast.parse(inspect.getsource(module)).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    defaults = to_dict(Config())
    parts = [_HEAD]
    for section, type_name, _ in _fields(classes["Config"]):
        node = classes[type_name]
        parts.append(f"## {section}\n\n{ast.get_docstring(node)}\n")
        rows = [
            (f"`{section}.{name}`", f"`{annotation}`", f"`{_yaml(defaults[section][name])}`", text)
            for name, annotation, text in _fields(node)
        ]
        parts.append(_table(("key", "type", "default", "meaning"), rows))
    names = list(next(iter(PRESETS.values())))
    parts.append("## Presets of the objective\n\nWhat `objective.preset` gives to the fields left at null.\n")
    parts.append(
        _table(
            ("preset", *names),
            [(f"`{preset}`", *(_yaml(values[name]) for name in names)) for preset, values in PRESETS.items()],
        )
    )
    return "\n".join(parts)


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """(name, annotation, docstring on one line) of every field of a dataclass."""
    found = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            documented = following.value if isinstance(following, ast.Expr) else None
            text = documented.value if isinstance(documented, ast.Constant) else None
            text = " ".join(text.split()) if isinstance(text, str) else ""
            found.append((statement.target.id, ast.unparse(statement.annotation), text))
    return found


def _yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
