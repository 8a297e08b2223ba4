"""The arrays that samples hold: which member it is, and what no training could use of it."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from d2v_scale.shards.array_files import ArrayFile, ArrayHeader, npy_of, npz_header, npz_keys, npz_of

EXTENSIONS = ("npy", "npz")
MOST_AXES = 4
"""After the channels."""


def sole_key(content: bytes | memoryview) -> str:
    """The name of the one array in a `.npz`. Raises ValueError where there are several, or none."""
    keys = npz_keys(content)
    if len(keys) != 1:
        raise ValueError(
            f"holds {len(keys)} arrays ({', '.join(sorted(keys)) or 'none'}): name one (--key, in a recipe key)"
        )
    return keys[0]


def array_of(extension: str, content: bytes | memoryview, key: str | None = None) -> ArrayFile:
    """The array in a member. `key`: its name in a `.npz`; None: the only one. Raises ValueError."""
    if extension == "npy":
        return npy_of(content)
    return npz_of(content, sole_key(content) if key is None else key)


def header_of(extension: str, content: bytes | memoryview, key: str | None = None) -> ArrayHeader:
    """What the array in a member is, without its values. Arguments and errors as of `array_of`."""
    if extension == "npy":
        return npy_of(content).header
    return npz_header(content, sole_key(content) if key is None else key)


def check_shape(shape: tuple[int, ...]) -> None:
    """Raises ValueError for what is no (channels, axis_1 ... axis_n) with 1 to 4 axes and something along each."""
    if not 2 <= len(shape) <= MOST_AXES + 1:
        axes = f"channels and 1 to {MOST_AXES} axes"
        raise ValueError(f"has the shape {shape}, which is not one of {axes}: add an axis of one channel, or reshape")
    if 0 in shape:
        raise ValueError(f"has the shape {shape}, in which there is nothing")


def check_values(values: NDArray[np.float32]) -> None:
    """Raises ValueError where a value is infinite, or all are NaN: no training can use it, whatever NaN means."""
    if np.isinf(values).any():
        raise ValueError("holds values that are infinite, or too large for 32-bit numbers")
    if np.isnan(values).all():
        raise ValueError("holds nothing but NaN")


def measure(members: Mapping[str, bytes | memoryview], key: str | None = None) -> int:
    """The extent of the first axis after the channels. Raises where training could not use the sample's array,
    whatever the stem that reads it. `key`: of the array in a `.npz`; None: the only one."""
    found = next(((extension, members[extension]) for extension in EXTENSIONS if extension in members), None)
    if found is None:
        raise ValueError(f"has no .{', .'.join(EXTENSIONS)}")
    extension, content = found
    if len(content) == 0:
        raise ValueError("is empty")
    array = array_of(extension, content, key)
    check_shape(array.header.shape)
    with np.errstate(over="ignore"):
        check_values(array.whole().astype(np.float32))
    return array.header.shape[1]
