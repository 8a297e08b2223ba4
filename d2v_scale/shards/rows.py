"""A decoded sample, several of them stacked, and what turns the one into the other."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from d2v_scale.shards.reading import RawSample, Store

if TYPE_CHECKING:
    from PIL.Image import Image


class Row(NamedTuple):
    """One decoded sample."""

    key: str
    values: NDArray[Any]
    label: Any = None
    lacking: tuple[tuple[str, str], ...] = ()
    """Of a paired sample the parts that it does not have, and why."""
    cropped: tuple[str, ...] = ()
    """Of a paired sample the parts that are longer than what is read of them."""


@dataclass
class Stacked:
    """The inputs of a batch, and what its masks need to know."""

    inputs: Tensor
    valid: Tensor | None = None
    """True where `inputs` is real; None: everywhere."""
    grid: tuple[int, ...] | None = None
    """Extents of the axes of the positions (of images: rows, and patches in one); None where they are a line."""
    length: int | None = None
    """T, positions in a line."""
    valid_lengths: NDArray[np.int64] | None = None
    """(B,) real positions of each row, or of a grid (B, n) along each axis; None: all."""
    real_bt: NDArray[np.bool_] | None = None
    """(B, T) positions that may be predicted; None: all that are masked."""
    missing: int = 0
    """Positions that hold no value."""

    @property
    def positions(self) -> int:
        """T."""
        if self.grid is not None:
            return math.prod(self.grid)
        assert self.length is not None
        return self.length


@runtime_checkable
class Viewer(Protocol):
    """A decoder whose samples are pictures, which fine-tuning may change further before they are a row."""

    def view(self, sample: RawSample, draws: NDArray[np.float64]) -> "Image":
        """The sample, cropped and augmented by `draws`, uniforms in [0, 1)."""


class Decoder(Protocol):
    """How the samples of one stem become rows, and rows a batch."""

    draws: int
    """Uniforms that `training_row` and `part_row` take."""

    def training_row(self, store: Store, shard: int, item: int, length: int, draws: NDArray[np.float64]) -> Row:
        """One planned item, cropped and augmented. Raises SampleFault or whatever a decoder raises."""

    def evaluation_row(self, sample: RawSample) -> NDArray[Any]:
        """One sample without randomness."""

    def stack(self, rows: list[NDArray[Any]]) -> Stacked:
        """Rows to a batch."""

    def blank(self) -> NDArray[Any]:
        """A row of a batch that has none."""


class PartDecoder(Decoder, Protocol):
    """One whose samples may be parts of paired ones."""

    extensions: tuple[str, ...]
    """Of the members that it reads."""

    def stack(self, rows: list[NDArray[Any]], longest: int | None = None) -> Stacked:
        """Rows to a batch. `longest`: of paired samples, how long the longest of all ranks' rows is, as an index counts
        it (`PlannedBatch.longest_p`): rows are no shorter, and no shorter than a blank one."""

    def part_row(self, sample: RawSample, draws: NDArray[np.float64]) -> tuple[NDArray[Any], bool]:
        """This stem's part of a paired sample: cropped and augmented as in training, but not to the length of others;
        and whether it is longer than the stem reads (`longest_read`).
        Raises SampleFault or whatever a decoder raises."""
