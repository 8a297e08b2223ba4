"""Arrays in `.npy` and `.npz` files: what they are from their first bytes alone, and slices that read nothing else.

Files are read through functions, so that a member of a tar is sliced where it lies. NumPy parses the headers; nothing
is ever unpickled. Whatever is wrong with a file is a ValueError in words.
"""

import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

ReadAt = Callable[[int, int], bytes]
"""Bytes from a place in the file on; fewer at its end."""

_FIRST_BYTES = 256
"""Read at once: NumPy pads headers of arrays to 64 or 128 bytes."""
_LONGEST_HEADER = 10_000
_JOINED_GAP = 4096
"""Bytes between two parts of a slice that are rather read than skipped."""
_NUMBERS = "biuf"


@dataclass(frozen=True)
class ArrayHeader:
    """What an array is, from its header."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """As stored, in either byte order."""
    fortran_order: bool
    """Whether the first axis changes fastest."""
    start: int
    """Where the values begin, bytes."""


@dataclass(frozen=True)
class ArrayFile:
    """A `.npy` file: its header, and how its bytes are had."""

    header: ArrayHeader
    read_at: ReadAt

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of all axes."""
        return self.header.shape

    def whole(self) -> NDArray[Any]:
        """All of it, in native byte order, row-major."""
        header = self.header
        return self._native(self._read(header.start, math.prod(header.shape)), header.shape, header.fortran_order)

    def slice(self, axis: int, start: int, stop: int) -> NDArray[Any]:
        """Positions [start, stop) along one axis, in native byte order, row-major. Reads their bytes, and those between
        parts that lie less than 4 KiB apart. Raises ValueError for positions that are not there."""
        shape, item = self.header.shape, self.header.dtype.itemsize
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"has no axis {axis}: its shape is {shape}")
        axis %= len(shape)
        if not 0 <= start <= stop <= shape[axis]:
            raise ValueError(f"has no positions {start} to {stop} along axis {axis}: its shape is {shape}")
        stored = shape[::-1] if self.header.fortran_order else shape
        along = len(shape) - 1 - axis if self.header.fortran_order else axis
        parts, inner = math.prod(stored[:along]), math.prod(stored[along + 1 :])
        step, length = stored[along] * inner, (stop - start) * inner
        first = self.header.start + start * inner * item
        if parts * length == 0:
            values = np.zeros(0, dtype=self.header.dtype)
        elif (step - length) * item < _JOINED_GAP:
            values = self._read(first, (parts - 1) * step + length)
            values = np.lib.stride_tricks.as_strided(values, (parts, length), (step * item, item))
        else:
            values = np.concatenate([self._read(first + part * step * item, length) for part in range(parts)])
        cut = (*shape[:axis], stop - start, *shape[axis + 1 :])
        return self._native(values, cut, self.header.fortran_order)

    def _read(self, start: int, count: int) -> NDArray[Any]:
        wanted = count * self.header.dtype.itemsize
        content = self.read_at(start, wanted) if wanted else b""
        if len(content) < wanted:
            raise ValueError(f"is cut off: {len(content)} of {wanted} bytes are there")
        return np.frombuffer(content, dtype=self.header.dtype, count=count)

    def _native(self, values: NDArray[Any], shape: tuple[int, ...], fortran_order: bool) -> NDArray[Any]:
        array = values.reshape(shape[::-1]).transpose() if fortran_order else values.reshape(shape)
        return np.array(array, dtype=self.header.dtype.newbyteorder("="), order="C")


def open_npy(read_at: ReadAt, size: int) -> ArrayFile:
    """The `.npy` file of `size` bytes that `read_at` reads. Reads its header alone.

    Raises ValueError where it holds no array of real numbers, or not exactly its bytes.
    """
    return ArrayFile(_header(read_at, size), read_at)


def npy_of(content: bytes | memoryview) -> ArrayFile:
    """A `.npy` file that is in memory."""
    return open_npy(lambda start, size: bytes(content[start : start + size]), len(content))


@contextmanager
def npy_in(path: str | Path, offset: int = 0, size: int | None = None) -> Iterator[ArrayFile]:
    """The `.npy` file that is `size` bytes of the file at `path`, from `offset` on; None: all that follow."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        held = os.fstat(descriptor).st_size - offset if size is None else size
        yield open_npy(lambda start, count: _read_all(descriptor, offset + start, count), held)
    finally:
        os.close(descriptor)


def npz_keys(content: bytes | memoryview) -> list[str]:
    """Names of the arrays in a `.npz` file that is in memory."""
    with _zip(content) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def npz_header(content: bytes | memoryview, key: str) -> ArrayHeader:
    """What the array of this name is. Decompresses its beginning alone."""
    with _zip(content) as archive, archive.open(_entry(archive, key)) as stream:
        beginning = stream.read(_LONGEST_HEADER + 12)
        size = archive.getinfo(_entry(archive, key)).file_size
        return _header(lambda start, count: beginning[start : start + count], size)


def npz_of(content: bytes | memoryview, key: str) -> ArrayFile:
    """The array of this name in a `.npz` file that is in memory, decompressed."""
    with _zip(content) as archive:
        return npy_of(archive.read(_entry(archive, key)))


@contextmanager
def _zip(content: bytes | memoryview) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"is no .npz that can be read: {error}") from error


def _entry(archive: zipfile.ZipFile, key: str) -> str:
    names = archive.namelist()
    if f"{key}.npy" not in names:
        held = ", ".join(sorted(name.removesuffix(".npy") for name in names)) or "nothing"
        raise ValueError(f"has no array {key!r}: it holds {held}")
    return f"{key}.npy"


def _header(read_at: ReadAt, size: int) -> ArrayHeader:
    beginning = read_at(0, min(size, _FIRST_BYTES))
    length = _header_length(beginning)
    if length > _LONGEST_HEADER:
        raise ValueError(f"has a header of {length} bytes, which no array of numbers needs")
    if length > len(beginning):
        beginning += read_at(len(beginning), min(size, length) - len(beginning))
    stream = io.BytesIO(beginning)
    try:
        version = npy.read_magic(stream)
        # Version 3 differs from 2 in the encoding of the names of fields, which arrays of numbers do not have.
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except Exception as error:  # NumPy's parser raises anything for a damaged header, tokenize.TokenError included
        said = str(error).splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"has no header of an array: {said[0]}") from error
    return _checked(ArrayHeader(tuple(shape), dtype, fortran_order, stream.tell()), size)


def _header_length(beginning: bytes) -> int:
    """Bytes until the values."""
    if len(beginning) < 12 or beginning[:6] != npy.MAGIC_PREFIX:
        raise ValueError("is no .npy file")
    if (beginning[6], beginning[7]) not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"is of version {beginning[6]}.{beginning[7]} of .npy, which is not known")
    width = 2 if beginning[6] == 1 else 4
    return 8 + width + int.from_bytes(beginning[8 : 8 + width], "little")


def _checked(header: ArrayHeader, size: int) -> ArrayHeader:
    dtype = header.dtype
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are never loaded")
    if dtype.kind not in _NUMBERS or dtype.subdtype is not None:
        remedy = ": store real and imaginary parts as channels" if dtype.kind == "c" else ""
        raise ValueError(f"holds values of type {dtype}, which are no real numbers{remedy}")
    if any(isinstance(extent, bool) or extent < 0 for extent in header.shape):
        raise ValueError(f"has the shape {header.shape}")
    wanted = header.start + math.prod(header.shape) * dtype.itemsize
    if size < wanted:
        raise ValueError(f"is cut off: {size} of {wanted} bytes are there")
    if size > wanted:
        raise ValueError(f"has {size - wanted} bytes behind the end of its array of shape {header.shape}")
    return header


def _read_all(descriptor: int, start: int, size: int) -> bytes:
    """`size` bytes from `start` on, or what there is of them."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(descriptor, size, start)):  # a system call reads 2 GiB at most
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]
