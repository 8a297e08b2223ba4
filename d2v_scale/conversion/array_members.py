"""Files of arrays to members of which a crop can read its slice: `.npy`, row-major, little endian, not compressed."""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.conversion.array_tables import TableReading, read_table
from d2v_scale.modalities.array.members import EXTENSIONS as MEMBERS
from d2v_scale.modalities.array.members import array_of, check_shape, header_of

TABLES = ("csv", "tsv")
EXTENSIONS = (*MEMBERS, *TABLES)


@dataclass(frozen=True)
class Layout:
    """What all samples of a set have in common."""

    channels: int
    axes: int
    """After the channels."""

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Layout":
        """Of an array of this shape. Raises ValueError for one that no training could use."""
        check_shape(shape)
        return cls(shape[0], len(shape) - 1)

    def __str__(self) -> str:
        channels = "1 channel" if self.channels == 1 else f"{self.channels} channels"
        return f"{channels} and {'1 axis' if self.axes == 1 else f'{self.axes} axes'}"


@dataclass
class ArrayReading:
    """How files become arrays."""

    key: str | None = None
    """Of the array in a `.npz`; None: the only one."""
    table: TableReading = field(default_factory=TableReading)
    layout: Layout | None = None
    """What every sample has to have; None: nothing is known."""

    def shape(self, content: bytes, extension: str) -> tuple[int, ...]:
        """Of the array in a file; of `.npy` and `.npz` from its header alone. Raises ValueError."""
        _require_content(content)
        if extension in TABLES:
            return read_table(content, self.table).shape
        return header_of(extension, content, self.key).shape

    def read(self, content: bytes, extension: str) -> NDArray[Any]:
        """The array in a file, in native byte order, row-major. Raises ValueError."""
        _require_content(content)
        if extension in TABLES:
            return read_table(content, self.table)
        return array_of(extension, content, self.key).whole()


def array_members(content: bytes, extension: str, reading: ArrayReading) -> dict[str, bytes]:
    """The array in a file as a member, of the type that it has; of tables float32. Raises ValueError for one that
    cannot be read, and where the layout of the set is another."""
    values = reading.read(content, extension)
    layout = Layout.of(values.shape)
    if reading.layout not in (None, layout):
        raise ValueError(f"has {layout}; its set has {reading.layout}")
    return {"npy": npy_bytes(values)}


def npy_bytes(values: NDArray[Any]) -> bytes:
    """A `.npy` file: row-major, little endian."""
    out = io.BytesIO()
    stored = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    np.lib.format.write_array(out, stored, allow_pickle=False)
    return out.getvalue()


def _require_content(content: bytes) -> None:
    if not content:
        raise ValueError("is empty")
