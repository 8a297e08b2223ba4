"""Kinds of values in a DeepSpeed JSON. DeepSpeed itself takes "false" for true, and fails on others after the start."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a value may be, in words and as a test."""

    says: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    # JSON writes 5e8 as a float.
    return _is_number(value) and value >= 0 and value == int(value)


def same(a: Any, b: Any) -> bool:
    """Equal as JSON values: 1 and 1.0 are, 1 and true are not."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
COUNT = Kind("a whole number", _is_count)
POSITIVE = Kind("a whole number above 0", lambda value: _is_count(value) and value > 0)
EVEN_COUNT = Kind("an even number above 0", lambda value: _is_count(value) and value > 0 and value % 2 == 0)
PRINT_EVERY = Kind("a whole number above 0, or Infinity", lambda value: value == math.inf or POSITIVE.holds(value))
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
TEXT = Kind("text", lambda value: isinstance(value, str))
LIST = Kind("a list", lambda value: isinstance(value, list))
SECTION = Kind("an object", lambda value: isinstance(value, dict))


def one_of(*values: Any) -> Kind:
    """One of these."""
    *most, last = (repr(value) for value in values)
    return Kind(f"{', '.join(most)} or {last}", lambda value: any(same(value, each) for each in values))


def or_null(kind: Kind) -> Kind:
    """Also null, where DeepSpeed reads it as left out."""
    return Kind(f"{kind.says}, or null", lambda value: value is None or kind.holds(value))
