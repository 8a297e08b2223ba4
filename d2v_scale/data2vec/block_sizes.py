"""Sizes of blocks as a recipe writes them: positions, shares of an axis, or the units that an axis has.

`resolved` turns them into numbers along named axes in their order, which is what masks are drawn from. No tensors here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import ConfigError

_WITH_UNIT = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([^\W\d_]+)\s*")
_SIZE = "objective.masking.size"
_TUBES = "objective.masking.tubes"


@dataclass(frozen=True)
class Axis:
    """An axis along which the positions of a stem lie."""

    name: str
    units: Mapping[str, float] = field(default_factory=dict)
    """Positions in one of each unit that sizes along it may be given in."""


def resolved(config: MaskingConfig, axes: Sequence[Axis]) -> MaskingConfig:
    """The same masks, the size of `blocks` written as positions (int) or a share (float) of every axis, in their order.
    Raises ConfigError for what these axes do not have. Of other kinds, which have no such sizes, they are as given."""
    if config.kind != "blocks":
        _check_not_set(config)
        return config
    names = [axis.name for axis in axes]
    tubes = config.tubes or []
    for name in tubes:
        if name not in names:
            raise ConfigError(_TUBES, f"names the axis {name!r}", f"There is {_listed(names)}.")
    if set(tubes) == set(names):
        raise ConfigError(_TUBES, f"names {_listed(names, 'and')}", "Leave out an axis along which masks differ.")
    key, given = _given(config)
    if not isinstance(given, dict):
        given = {axis.name: given for axis in axes}
    for name in given:
        if name not in names:
            raise ConfigError(key, f"names the axis {name!r}", f"There is {_listed(names)}.")
    sizes: dict[str, int | float | str] = {}
    for axis in axes:
        if axis.name not in given and axis.name not in tubes:
            raise ConfigError(
                key, f"says nothing of the axis {axis.name}", "Give a size along it, or name it in tubes."
            )
        sizes[axis.name] = 1 if axis.name in tubes else _positions(key, given[axis.name], axis)
    return replace(config, size=sizes)


def check(config: MaskingConfig, axes: Sequence[Axis], extents: Sequence[int]) -> None:
    """Raises ConfigError for blocks that `resolved` refuses, and for those that are larger than the axes of the longest
    sample, `extents`."""
    sizes = resolved(config, axes).size
    if config.kind != "blocks":
        return
    assert isinstance(sizes, dict)
    for (name, size), extent in zip(sizes.items(), extents, strict=True):
        if isinstance(size, int) and size > extent:
            key, given = _given(config)
            written = f"{given!r}, " if isinstance(given, str) else ""
            raise ConfigError(
                key,
                f"is {written}{size} positions along {name}, which has {extent}",
                f"Give at most {extent}, or a share.",
            )


def _given(config: MaskingConfig) -> tuple[str, dict[str, int | float | str] | int | float | str]:
    """The size as it is written, and where."""
    return ("objective.masking.length", config.length) if config.size is None else (_SIZE, config.size)


def _check_not_set(config: MaskingConfig) -> None:
    for name in ("size", "tubes"):
        if getattr(config, name) is not None:
            remedy = "Leave it out, or set objective.masking.kind to blocks."
            raise ConfigError(f"objective.masking.{name}", f"is set, but the kind of masks is {config.kind!r}", remedy)


def _positions(key: str, size: int | float | str, axis: Axis) -> int | float:
    """Positions (int) or a share (float) along the axis."""
    if isinstance(size, str):
        return _of_unit(key, size, axis)
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        raise ConfigError(key, f"is {size!r} along {axis.name}", _REMEDY)
    if isinstance(size, int):
        if size < 1:
            raise ConfigError(key, f"is {size} positions along {axis.name}", "Give at least 1.")
        return size
    if not 0 < size <= 1:
        raise ConfigError(
            key,
            f"is {size} along {axis.name}",
            "A fraction is a share of the axis, above 0 and at most 1; positions are whole numbers.",
        )
    return size


def _of_unit(key: str, size: str, axis: Axis) -> int:
    found = _WITH_UNIT.fullmatch(size)
    if found is None:
        raise ConfigError(key, f"is {size!r} along {axis.name}", _REMEDY)
    try:
        number = float(found[1])
    except ValueError:
        raise ConfigError(key, f"is {size!r} along {axis.name}", _REMEDY) from None
    if found[2] not in axis.units:
        known = f"It has {_listed(list(axis.units))}." if axis.units else "Give positions, or a share."
        raise ConfigError(key, f"is {size!r}, a unit that the axis {axis.name} does not have", known)
    positions = number * axis.units[found[2]]
    if not (math.isfinite(positions) and positions >= 0.5):
        raise ConfigError(key, f"is {size!r}, which is {positions:g} positions along {axis.name}", "Give at least one.")
    return math.floor(positions + 0.5)


_REMEDY = "Give positions (3), a share of the axis (0.2), or a number and a unit ('0.2 s')."


def _listed(names: list[str], word: str = "or") -> str:
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
