"""A YAML file and `section.key=value` overrides become a `Config`; everything wrong with them is told at once."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from etr_megatron.config.coerce import Mismatch, coerce, describe
from etr_megatron.config.schema import Config
from etr_megatron.config.validate import render, violations
from etr_megatron.errors import UserError

OVERRIDE = "command line"
"""Source of a value that an override gave."""

SECTIONS: dict[str, dict[str, Any]] = {section: get_type_hints(cls) for section, cls in get_type_hints(Config).items()}
"""Annotation of every key of every section."""


@dataclass(frozen=True)
class _Setting:
    """One value as the user wrote it. verbatim: the raw text of an override, None in a file."""

    section: str
    name: str
    node: yaml.Node | None
    shown: str
    source: str
    verbatim: str | None = None

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (None: the defaults), apply `overrides` (`section.key=value`, later ones win), check everything.

    Raises one UserError that lists every problem: unknown sections and keys with the nearest known one, values of the
    wrong type, and violated constraints, each with its key, value and source (file and line, or command line).
    Layout constraints that need the world size are checked by `validate` and `resolve`.
    """
    problems: list[str] = []
    settings = _read_file(Path(path), problems) if path is not None else []
    for override in overrides:
        setting = _read_override(override, problems)
        if setting is not None:
            settings.append(setting)

    config = Config()
    sources: dict[str, str] = {}
    broken: set[str] = set()
    # The last setting of a key is the one that counts: an override also mends a bad value in the file.
    for setting in {s.key: s for s in settings}.values():
        try:
            value = _value(setting)
        except Mismatch as mismatch:
            broken.add(setting.key)
            problems.append(f"{setting.key} = {setting.shown} ({setting.source}): must be {mismatch}")
            continue
        section = replace(getattr(config, setting.section), **{setting.name: value})
        config = replace(config, **{setting.section: section})
        sources[setting.key] = setting.source

    problems += [render(violation, config, sources) for violation in violations(config) if not broken & set(violation.keys)]
    if problems:
        head = f"invalid configuration, {len(problems)} problem{'s' if len(problems) > 1 else ''}:"
        raise UserError("\n".join([head, *(f"  - {problem}" for problem in problems)]))
    return config


def _value(setting: _Setting) -> Any:
    hint = SECTIONS[setting.section][setting.name]
    if setting.node is None:  # an override that is no YAML at all can still be plain text
        if hint in (str, str | None):
            return setting.verbatim
        raise Mismatch(describe(hint))
    return coerce(setting.node, hint, setting.verbatim)


def _read_override(override: str, problems: list[str]) -> _Setting | None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals:
        problems.append(f"{override} ({OVERRIDE}): an override is written section.key=value")
        return None
    if not dot:
        problems.append(f"{section} ({OVERRIDE}): an override is written section.key=value{_hint(section)}")
        return None
    if not _known(section, name, OVERRIDE, problems):
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    else:
        # An empty value is no document; it means null, as it does in a file.
        node = node if node is not None else yaml.ScalarNode("tag:yaml.org,2002:null", "")
    return _Setting(section, name, node, _shorten(text), OVERRIDE, verbatim=text)


def _read_file(path: Path, problems: list[str]) -> list[_Setting]:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        problems.append(f"config file {path} cannot be read: {error.strerror}")
        return []
    except UnicodeDecodeError as error:
        problems.append(f"config file {path} is not UTF-8 text (byte {error.start})")
        return []
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problems.append(f"{path}{line}: not valid YAML, {error.problem or error.context}")
        return []
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        problems.append(f"{path}: not valid YAML, {reason}")
        return []
    if root is None:
        return []
    settings: list[_Setting] = []
    for section, node, source in _entries(root, str(path), "", problems):
        if section not in SECTIONS:
            problems.append(f"{section} ({source}): unknown section{_hint(section)}")
        elif not (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):  # a section all commented out
            settings += [
                _Setting(section, name, value, _shorten(text[value.start_mark.index : value.end_mark.index]), where)
                for name, value, where in _entries(node, str(path), f"{section}.", problems)
                if _known(section, name, where, problems)
            ]
    return settings


def _entries(node: yaml.Node, path: str, prefix: str, problems: list[str]) -> list[tuple[str, yaml.Node, str]]:
    """(key, value, file:line) of a mapping; a node that is none, and keys given twice, are problems."""
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        what = f"{prefix[:-1]} ({where})" if prefix else where
        problems.append(f"{what}: must be a mapping of {'keys to values' if prefix else 'sections'}")
        return []
    entries: dict[str, tuple[str, yaml.Node, str]] = {}
    for key_node, value in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{where}: a key must be plain text")
            continue
        key = key_node.value
        if key in entries:
            problems.append(f"{prefix}{key} ({where}): given twice, first at {entries[key][2]}")
        entries[key] = (key, value, where)
    return list(entries.values())


def _known(section: str, name: str, source: str, problems: list[str]) -> bool:
    if section not in SECTIONS:
        near = difflib.get_close_matches(section, SECTIONS, n=1)
        exact = [s for s in near if name in SECTIONS[s]]
        hint = f"; did you mean {exact[0]}.{name}?" if exact else _hint(name) or _hint(section)
        problems.append(f"{section}.{name} ({source}): unknown section {section}{hint}")
        return False
    if name not in SECTIONS[section]:
        problems.append(f"{section}.{name} ({source}): unknown key{_hint(name, section)}")
        return False
    return True


def _hint(name: str, section: str | None = None) -> str:
    """`; did you mean ...?`: the key of that name in another section, else the nearest key here, else anywhere."""
    everywhere: dict[str, list[str]] = {}
    for known_section, keys in SECTIONS.items():
        for key in keys:
            everywhere.setdefault(key, []).append(f"{known_section}.{key}")
    if name in everywhere:
        return f"; did you mean {' or '.join(everywhere[name])}?"
    here: Collection[str] = SECTIONS if section is None else SECTIONS[section]
    near = difflib.get_close_matches(name, here, n=1)
    if not near:  # `promts` for `prompts_per_step`: a near beginning counts too
        beginnings = {key[: len(name) + 1]: key for key in here}
        near = [beginnings[match] for match in difflib.get_close_matches(name, beginnings, n=1, cutoff=0.75)]
    if near:
        return f"; did you mean {f'{section}.' if section else ''}{near[0]}?"
    near = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {' or '.join(everywhere[near[0]])}?"
    return f"; known are {', '.join(sorted(here))}"


def _shorten(text: str) -> str:
    text = " ".join(text.split()) or "null"
    return text if len(text) <= 60 else f"{text[:57]}..."
