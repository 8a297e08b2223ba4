"""What the parser would not say of a YAML file: which key has a value of another type, and which one stands twice."""

import dataclasses
import types
import typing
from typing import Any

import yaml

from d2v_scale.errors import ConfigError

_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_NOTHING = type(None)


def check_kind(key: str, value: Any, kind: Any) -> None:
    """Raises ConfigError where `value` is not of the type `kind`, which is told from plain ones: numbers, texts,
    choices, lists of these, sections, and unions with null. What else a key may be is the parser's to judge."""
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if all(map(_is_judged, options)) and not any(_fits(value, option) for option in options):
        raise ConfigError(key, f"is {value!r}", f"Give {in_words(kind)}.")


def in_words(kind: Any) -> str:
    """What a key of that type takes: `a number or null`."""
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    nothing = ["null"] if _NOTHING in options else []
    return " or ".join([*(_told(option) for option in options if option is not _NOTHING), *nothing])


def section_of(kind: Any) -> type | None:
    """The configuration class of a key that holds one, none, or a list of them."""
    options = [kind, *typing.get_args(kind)]
    options += [inner for option in options for inner in typing.get_args(option)]
    return next((one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def named_section(kind: Any) -> type | None:
    """The configuration class of a key that holds sections by names of the user's own."""
    return section_of(kind) if typing.get_origin(kind) is dict else None


def check_keys_once(text: str) -> None:
    """Raises ConfigError for a key that stands twice in a section, of which YAML would silently take the last."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # the parser says it
        return
    _check_once(node, "")


def _check_once(node: yaml.Node | None, prefix: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check_once(item, f"{prefix}{number}.")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{prefix}{name}", f"stands twice, in lines {seen[name]} and {line}", "Leave one out.")
        seen[name] = line
        _check_once(value, f"{prefix}{name}.")


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _is_judged(kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return inner[0] in _WORDS
    return kind in _WORDS or kind is _NOTHING or origin is typing.Literal or (origin is dict and _is_section(inner[1]))


def _told(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is list:
        return f"a list, each {in_words(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {' or '.join(dict.fromkeys(map(in_words, inner)))}"
    if origin is dict:
        return f"names, each with {in_words(inner[1])}"
    return "keys and values" if _is_section(kind) else _WORDS.get(kind, str(kind))


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is _NOTHING:
        return value is None
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind in (int, float) and isinstance(value, str):  # YAML takes 1e-6 for a text
        return _reads(value, kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _reads(text: str, kind: type[int] | type[float]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
