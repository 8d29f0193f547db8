"""Convert a YAML node to a value of an annotated type, or report what was expected.

Works on nodes rather than on loaded values because YAML 1.1 guesses types the user did not mean (`1e-3` is text, `yes`
is a bool, `12:30` is a number): here the annotation decides, and text stays as written.
"""

from __future__ import annotations

import math
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

_DIGITS = r"\d(_?\d)*"
"""As `int` and `float` take them: an underscore stands between two digits."""
_FLOAT = re.compile(rf"[+-]?({_DIGITS}\.?\d*|\.\d+)([eE][+-]?\d+)?")
_INT = re.compile(rf"[+-]?{_DIGITS}")
_MAX_INT_CHARS = 1000
"""Python does not parse integers of more than 4300 digits."""


class Mismatch(ValueError):
    """The node is not of the wanted type."""


def describe(hint: Any) -> str:
    """The annotation in words: `int | Literal["auto"]` becomes `a whole number or "auto"`."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        names = ", ".join(f'"{option}"' for option in get_args(hint))
        return names if len(get_args(hint)) == 1 else f"one of {names}"
    if get_origin(hint) is tuple:
        return "a list of strings, such as [a, b]"
    if get_origin(hint) is dict:
        return {
            float: "a mapping of names to numbers, such as {a: 0.5, b: 2}",
            int: "a mapping of names to whole numbers, such as {a: 1, b: 2}",
            str: "a mapping of names to text, such as {a: b}",
        }.get(get_args(hint)[1], "a mapping of names to values, such as {a: true, b: text}")
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", NoneType: "null"}[hint]


def coerce(node: yaml.Node, hint: Any, verbatim: str | None = None) -> Any:
    """The value of `node` converted to the type `hint`.

    hint: bool, int, float, str, Literal of texts, tuple[str, ...], dict[str, ...] of float, int, str or a union, or a union
        of these and None, str last.
    verbatim: the text of a command-line override; text fields take it unchanged unless it is quoted, so that
        `data.prompt_template=Q: {prompt}` needs no YAML quoting. For a key that may be a list or a mapping, text in brackets is
        always parsed as one, and so is `a: b` where a mapping may stand.
    Raises Mismatch. An integer is a valid float, a bool is never a number, `1e-3` is a float.
    """
    options = _options(hint)
    if NoneType in options and _is_null(node):
        return None
    if (several := _several(hint)) and isinstance(node, yaml.CollectionNode) and (node.flow_style or verbatim is None):
        options = (several,)
    if len(options) == 1:  # its own error message is more specific
        return _coerce_one(node, options[0], verbatim)
    for option in options:
        if option is NoneType:
            continue
        try:
            return _coerce_one(node, option, verbatim)
        except Mismatch:
            continue
    raise Mismatch(describe(hint))


def plain_text(text: str, hint: Any) -> str:
    """The text of an override that is not valid YAML, for a key that takes text. Raises Mismatch for other keys, and for text
    with an opening bracket if the key may be a list or a mapping."""
    if _several(hint) and text.lstrip().startswith(("[", "{")):
        raise Mismatch(f"{describe(hint)}; quote text that contains brackets, a comma or a colon")
    if str not in _options(hint):
        raise Mismatch(describe(hint))
    return text


def _several(hint: Any) -> Any:
    """The list or mapping type in a union, or None."""
    return next((option for option in _options(hint) if get_origin(option) in (tuple, dict)), None)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _coerce_one(node: yaml.Node, hint: Any, verbatim: str | None) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise Mismatch(describe(hint))
        return tuple(_text(child, None) for child in node.value)
    if get_origin(hint) is dict:
        return _mapping(node, hint)
    if get_origin(hint) is Literal:
        text = _text(node, verbatim)
        if text not in get_args(hint):
            raise Mismatch(describe(hint))
        return text
    if hint is str:
        return _text(node, verbatim)
    return _scalar(node, hint)


def _mapping(node: yaml.Node, hint: Any) -> dict[str, Any]:
    """A mapping from unique names to values of one type, or of one of a union's types."""
    if not isinstance(node, yaml.MappingNode):
        raise Mismatch(describe(hint))
    of = get_args(hint)[1]
    try:
        found = {_text(key, None): coerce(value, of) for key, value in node.value}
    except Mismatch:
        raise Mismatch(describe(hint)) from None
    if len(found) < len(node.value):
        raise Mismatch(f"{describe(hint)}, each name once")
    return found


def _scalar(node: yaml.Node, hint: Any) -> bool | int | float:
    """A plain (unquoted) scalar as bool, int or finite float."""
    if not isinstance(node, yaml.ScalarNode) or node.style in ("'", '"', "|", ">"):
        raise Mismatch(describe(hint))
    text = node.value
    if hint is bool and node.tag == "tag:yaml.org,2002:bool":
        return text.lower() in ("true", "yes", "on")
    if hint is int and _INT.fullmatch(text) and len(text) <= _MAX_INT_CHARS:
        return int(text)
    if hint is float and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    raise Mismatch(describe(hint))


def _text(node: yaml.Node, verbatim: str | None) -> str:
    quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
    if verbatim is not None and not quoted and not _is_null(node):
        return verbatim
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise Mismatch(describe(str))
    return node.value


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
