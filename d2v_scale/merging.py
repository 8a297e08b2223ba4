"""Settings of one stem over those of all: a section of overrides in which null inherits."""

import dataclasses
from typing import Any, TypeVar

Section = TypeVar("Section")


def merged(base: Section, own: Any) -> Section:
    """`base` with the values of `own` that are set. `own`: a dataclass with the same fields, or some of them; None:
    nothing is overridden."""
    if own is None:
        return base
    given = {f.name: value for f in dataclasses.fields(own) if (value := getattr(own, f.name)) is not None}
    return dataclasses.replace(base, **given) if given else base  # type: ignore[type-var]
