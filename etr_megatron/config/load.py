"""Load a YAML file and `section.key=value` overrides into a `Config`; reports all problems at once."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from etr_megatron.config.coerce import Mismatch, coerce, plain_text
from etr_megatron.config.invalid import InvalidConfigError
from etr_megatron.config.megatron_fields import FIELDS, KEY
from etr_megatron.config.schema import Config
from etr_megatron.config.validate import depends_on, render, violations, wrong_keys

OVERRIDE = "command line"
"""Source of a value set by an override."""

SECTIONS: dict[str, dict[str, Any]] = {section: get_type_hints(cls) for section, cls in get_type_hints(Config).items()}
"""Annotation of every key of every section."""

KEYS = frozenset(f"{section}.{name}" for section, names in SECTIONS.items() for name in names)


@dataclass
class _Problems:
    """Problems to report, and the keys whose values could not be read; these keys are not checked further."""

    messages: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)

    def add(self, problem: str, unread: Collection[str] = ()) -> None:
        self.messages.append(problem)
        self.unread.update(unread)


@dataclass(frozen=True)
class _Setting:
    """One value as the user wrote it. shown: its text, shortened for messages. verbatim: the raw text of an override, None in a
    file. entry: the name of the only entry that it sets, of a mapping; None for a whole value."""

    section: str
    name: str
    node: yaml.Node | None
    shown: str
    source: str
    verbatim: str | None = None
    entry: str | None = None

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def written(self) -> str:
        return self.key if self.entry is None else f"{self.key}.{self.entry}"

    @property
    def hint(self) -> Any:
        hint = SECTIONS[self.section][self.name]
        return hint if self.entry is None else get_args(hint)[1]


def is_mapping(hint: Any) -> bool:
    """Whether every value of a key of this type is a mapping, so that an override can set one entry."""
    return get_origin(hint) is dict


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (None: the defaults), apply `overrides` (`section.key=value`, later ones win), check everything.

    Raises one InvalidConfigError that lists every problem: unknown sections and keys with the nearest known one, values of the
    wrong type, and violated constraints, each with its key, value and source (file and line, or command line).
    Layout constraints that need the world size are checked by `validate` and `resolve`.
    """
    problems = _Problems()
    settings = _read_file(Path(path), problems) if path is not None else []
    for override in overrides:
        setting = _read_override(override, problems)
        if setting is not None:
            settings.append(setting)

    config = Config()
    sources: dict[str, str] = {}
    for setting in _last_of_each(settings):
        try:
            value = _value(setting)
        except Mismatch as mismatch:
            problems.add(_mismatch_message(setting, mismatch), [setting.key])
            continue
        section, source = getattr(config, setting.section), setting.source
        if setting.entry is not None:
            value = {**getattr(section, setting.name), setting.entry: value}
            earlier = sources.get(setting.key, source)
            source = earlier if earlier.endswith(source) else f"{earlier}, {source}"
        elif isinstance(value, dict):
            sources |= {f"{setting.key}.{entry}": source for entry in value}
        config = replace(config, **{setting.section: replace(section, **{setting.name: value})})
        sources[setting.written], sources[setting.key] = setting.source, source
        if setting.source == OVERRIDE and setting.entry is None:  # even if the file's value could not be read
            problems.unread.discard(setting.key)

    found = [one for one in violations(config) if problems.unread.isdisjoint(depends_on(one, config))]
    messages = [*problems.messages, *(render(violation, config, sources) for violation in found)]
    if messages:
        raise InvalidConfigError("invalid configuration", messages, config, problems.unread | wrong_keys(found))
    return config


def _last_of_each(settings: Sequence[_Setting]) -> list[_Setting]:
    """The settings that count: the last one of a key, which also fixes a bad value in the file, and the last one of every entry
    of a mapping after that."""
    kept: dict[str, dict[str | None, _Setting]] = {}
    for setting in settings:
        if setting.entry is None:
            kept[setting.key] = {}
        kept.setdefault(setting.key, {})[setting.entry] = setting
    return [setting for by_entry in kept.values() for setting in by_entry.values()]


def _value(setting: _Setting) -> Any:
    if setting.node is None:  # an override that is not valid YAML can still be plain text
        assert setting.verbatim is not None  # nothing is read from a file that is not
        return plain_text(setting.verbatim, setting.hint)
    return coerce(setting.node, setting.hint, setting.verbatim)


def _mismatch_message(setting: _Setting, mismatch: Mismatch) -> str:
    if not setting.shown:
        return (
            f"{setting.written} ({setting.source}): the value is empty; give {mismatch}, or leave the key out for its default"
        )
    return f"{setting.written} = {setting.shown} ({setting.source}): must be {mismatch}"


def _read_override(override: str, problems: _Problems) -> _Setting | None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals:
        problems.add(f"{override} ({OVERRIDE}): an override must have the form section.key=value")
        return None
    if not dot:
        near, hint = _nearest(section)
        problems.add(f"{section} ({OVERRIDE}): an override must have the form section.key=value{hint}", near)
        return None
    name, entry = _mapping_and_entry(section, name)
    if not _known(section, name, OVERRIDE, problems):
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    else:
        # An empty value is not a YAML document; it means null, as in a file.
        node = node if node is not None else yaml.ScalarNode("tag:yaml.org,2002:null", "")
    return _Setting(section, name, node, _shorten(text), OVERRIDE, verbatim=text, entry=entry)


def _mapping_and_entry(section: str, name: str) -> tuple[str, str | None]:
    """`options.margin` as (options, margin) if that key is always a mapping; else (name, None)."""
    mapping, dot, entry = name.partition(".")
    return (mapping, entry) if dot and is_mapping(SECTIONS.get(section, {}).get(mapping)) else (name, None)


def _read_file(path: Path, problems: _Problems) -> list[_Setting]:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        problems.add(f"config file {path} cannot be read: {error.strerror}", KEYS)
        return []
    except UnicodeDecodeError as error:
        problems.add(f"config file {path} is not UTF-8 text (byte {error.start})", KEYS)
        return []
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problems.add(f"{path}{line}: not valid YAML, {error.problem or error.context}", KEYS)
        return []
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        problems.add(f"{path}: not valid YAML, {reason}", KEYS)
        return []
    if root is None:
        return []
    settings: list[_Setting] = []
    for section, node, source in _entries(root, str(path), "", problems):
        if section not in SECTIONS:
            near, hint = _nearest(section)
            problems.add(f"{section} ({source}): unknown section{hint}", near)
        elif not (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):  # null if all its keys are commented out
            settings += [
                _Setting(section, name, value, _shorten(text[value.start_mark.index : value.end_mark.index]), where)
                for name, value, where in _entries(node, str(path), f"{section}.", problems)
                if _known(section, name, where, problems)
            ]
    return settings


def _entries(node: yaml.Node, path: str, prefix: str, problems: _Problems) -> list[tuple[str, yaml.Node, str]]:
    """(key, value, file:line) of a mapping; other nodes and duplicate keys are problems."""
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        what = f"{prefix[:-1]} ({where})" if prefix else where
        unread = [key for key in KEYS if key.startswith(prefix)]
        problems.add(f"{what}: must be a mapping of {'keys to values' if prefix else 'sections'}", unread)
        return []
    entries: dict[str, tuple[str, yaml.Node, str]] = {}
    for key_node, value in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.add(f"{where}: a key must be plain text")
            continue
        key = key_node.value
        if key in entries:
            problems.add(f"{prefix}{key} ({where}): given twice, first at {entries[key][2]}")
        entries[key] = (key, value, where)
    return list(entries.values())


def _known(section: str, name: str, source: str, problems: _Problems) -> bool:
    if section not in SECTIONS:
        near = difflib.get_close_matches(section, SECTIONS, n=1)
        exact = [f"{one}.{name}" for one in near if name in SECTIONS[one]]
        keys, hint = _suggestion(exact) if exact else _nearest(name)
        if not keys:
            keys, hint = _nearest(section)
        problems.add(f"{section}.{name} ({source}): unknown section {section}{hint}", keys)
        return False
    if name not in SECTIONS[section]:
        mapping, dot, entry = name.partition(".")
        if dot and any(map(is_mapping, get_args(SECTIONS[section].get(mapping)))):
            whole = f"{section}.{mapping}"
            problems.add(f"{section}.{name} ({source}): give the whole mapping, as {whole}={{{entry}: value}}", [whole])
            return False
        keys, hint = _nearest(mapping, section)
        problems.add(f"{section}.{name} ({source}): unknown key{hint}", keys)
        return False
    return True


def _nearest(name: str, section: str | None = None) -> tuple[list[str], str]:
    """The key that the user may have meant: one of that name in any section, a field of Megatron of that name, else the nearest
    here, else the nearest anywhere.

    Returns the keys (for a section, all of its keys), and `; did you mean ...?`.
    """
    everywhere: dict[str, list[str]] = {}
    for known_section, keys in SECTIONS.items():
        for key in keys:
            everywhere.setdefault(key, []).append(f"{known_section}.{key}")
    if name in everywhere:
        return _suggestion(everywhere[name])
    if name in FIELDS:
        return [KEY], f"; did you mean {KEY}.{name}?"
    here: Collection[str] = SECTIONS if section is None else SECTIONS[section]
    near = difflib.get_close_matches(name, here, n=1)
    if not near:  # `promts` for `prompts_per_step`: a similar prefix also counts
        beginnings = {key[: len(name) + 1]: key for key in here}
        near = [beginnings[match] for match in difflib.get_close_matches(name, beginnings, n=1, cutoff=0.75)]
    if near:
        return _suggestion([f"{section}.{near[0]}" if section else near[0]])
    near = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.75)
    return _suggestion(everywhere[near[0]]) if near else ([], f"; known: {', '.join(sorted(here))}")


def _suggestion(names: list[str]) -> tuple[list[str], str]:
    """Possibly meant keys or sections, as keys and as text."""
    keys = [key for name in names for key in KEYS if key == name or key.startswith(f"{name}.")]
    return keys, f"; did you mean {' or '.join(names)}?"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
