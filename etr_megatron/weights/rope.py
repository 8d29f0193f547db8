"""Reads the rotary embedding's parameters from a config.json, published or written by transformers 5, into one form.

A file with two contradictory values is refused, because transformers and servers would silently take one or the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from etr_megatron.errors import UserError
from etr_megatron.weights.hf_config import optional_object, positive_int, positive_number, spelled

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")

_YARN_OPTIONAL = ("beta_fast", "beta_slow")
_YARN_OTHER = ("attention_factor", "attn_factor", "extrapolation_factor", "mscale", "mscale_all_dim", "truncate")
"""transformers reads some of these, servers others."""


def read_rope(config: dict[str, Any], source: Path, *, fraction: float | None = None, latent: bool = False) -> dict[str, Any]:
    """`rope_type` ("default", "llama3" or "yarn"), `rope_theta` and, for the latter two, the parameters of their scaling.

    fraction: default of `partial_rotary_factor`, which is then part of the result; None for a family in which it is always 1.
    latent: whether the model has latent attention, whose YaRN has `mscale_all_dim`, a factor of the attention scale.

    Published configs have `rope_theta` and, for a scaled one, `rope_scaling`; transformers 5 writes all into `rope_parameters`.
    source: the file, for messages. Raises UserError for missing, contradictory or unsupported values.
    """
    places = {name: _place(config, name, source) for name in ("rope_scaling", "rope_parameters")}
    places = {name: place for name, place in places.items() if place}
    rest = [{key: value for key, value in place.items() if key != "rope_theta"} for place in places.values()]
    if rest and rest[0] != rest[-1]:
        raise UserError(f"{source}: rope_scaling and rope_parameters disagree; remove the wrong one")
    scaling = rest[0] if rest else {}
    rope = {"rope_type": scaling.get("rope_type", "default"), "rope_theta": _theta(config, places, source)}
    rope |= _partial(config, places, fraction, source)
    if rope["rope_type"] == "llama3":
        if latent:  # servers treat any scaling of latent attention as YaRN
            raise UserError(
                f"{source}: rope_type 'llama3' is not supported with latent attention; supported are default and yarn"
            )
        rope |= {name: positive_number(scaling, name, source) for name in _LLAMA3}
    if rope["rope_type"] == "yarn":
        if rope.get("partial_rotary_factor", 1) != 1:
            # YaRN's factor for queries and keys applies only to rotated dimensions: it cannot enter the attention scale.
            raise UserError(
                f"{source}: rope_type yarn turns whole heads here, not {rope['partial_rotary_factor']} of each "
                "(partial_rotary_factor)"
            )
        if latent:
            rope["mscale"] = rope["mscale_all_dim"] = _latent_scale(scaling, source)
            scaling = {name: value for name, value in scaling.items() if name not in ("mscale", "mscale_all_dim")}
        _refuse_other_yarn(scaling, source)
        rope["factor"] = positive_number(scaling, "factor", source)
        rope |= {name: positive_number(scaling, name, source) for name in _YARN_OPTIONAL if name in scaling}
    if rope["rope_type"] != "default":
        rope["original_max_position_embeddings"] = _original_positions(config, scaling, source)
    return rope


def _partial(config: dict[str, Any], places: dict[str, dict[str, Any]], default: float | None, source: Path) -> dict[str, Any]:
    name = "partial_rotary_factor"
    found = [place[name] for place in (config, *places.values()) if place.get(name) is not None]
    if default is None:
        for value in found:
            if value != 1:
                raise UserError(f"{source}: {name} is {spelled(value)}; only 1 is supported")
        return {}
    fractions = {positive_number({name: value}, name, source) for value in found} or {default}
    if len(fractions) > 1:
        raise UserError(f"{source}: {name} is {' and '.join(map(str, sorted(fractions)))}; remove the wrong one")
    (value,) = fractions
    if value > 1:
        raise UserError(f"{source}: {name} is {value}, more than 1")
    return {name: value}


def _latent_scale(scaling: dict[str, Any], source: Path) -> float:
    """`mscale_all_dim`, which must equal `mscale`: then their ratio, which scales cosines and sines, is 1."""
    scale, of_all = (positive_number(scaling, name, source) for name in ("mscale", "mscale_all_dim"))
    if scale != of_all:
        raise UserError(f"{source}: mscale is {scale} and mscale_all_dim {of_all}; only equal ones are supported")
    return of_all


def _refuse_other_yarn(scaling: dict[str, Any], source: Path) -> None:
    for name in _YARN_OTHER:
        if name in scaling and not (name == "truncate" and scaling[name] is True):
            raise UserError(
                f"{source}: {name} is {spelled(scaling[name])} for rope_type yarn; yarn is supported only without it"
            )


def _place(config: dict[str, Any], name: str, source: Path) -> dict[str, Any]:
    """One of the two objects without its nulls; `type` is the old name of `rope_type`."""
    place = {key: value for key, value in optional_object(config, name, source).items() if value is not None}
    kinds = [place.pop(key) for key in ("type", "rope_type") if key in place]
    if len(kinds) > 1 and kinds[0] != kinds[1]:
        raise UserError(f"{source}: {name} has the type {kinds[0]!r} and the rope_type {kinds[1]!r}; remove the wrong one")
    if any(isinstance(value, dict) for value in place.values()):
        raise UserError(f"{source}: {name} has several rotary embeddings ({', '.join(place)}); only one is supported")
    if kinds and kinds[0] not in ("default", "llama3", "yarn"):
        raise UserError(f"{source}: rope_type {kinds[0]!r} is not supported; supported are default, llama3 and yarn")
    return place | ({"rope_type": kinds[0]} if kinds else {})


def _theta(config: dict[str, Any], places: dict[str, dict[str, Any]], source: Path) -> float:
    """`rope_theta`. As in transformers, an object without it uses the config's own, or 10,000 if the config has none either."""
    outside = positive_number(config, "rope_theta", source, 10000.0)
    found = {name: positive_number(place, "rope_theta", source, outside) for name, place in places.items()}
    if config.get("rope_theta") is not None or not places:
        found["config.json itself"] = outside
    if len(set(found.values())) > 1:
        said = ", ".join(f"{value:g} in {name}" for name, value in found.items())
        raise UserError(f"{source}: rope_theta is {said}; remove the wrong one")
    return next(iter(found.values()))


def _original_positions(config: dict[str, Any], scaling: dict[str, Any], source: Path) -> int:
    """`original_max_position_embeddings`. Refused if it differs from the config's own: SGLang would prefer the config's value,
    and so would transformers for one of the two spellings."""
    name = "original_max_position_embeddings"
    inside = positive_int(scaling, name, source)
    outside = positive_int(config, name, source, inside)
    if inside != outside:
        raise UserError(f"{source}: {name} is {outside}, but {inside} for the rotary embedding; remove the wrong one")
    return inside
