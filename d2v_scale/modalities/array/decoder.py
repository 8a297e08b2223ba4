"""Members to rows of values, and rows to a batch: crop, transform, normalise, pad."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_scale.modalities.array.log_mel import spectrum_of
from d2v_scale.modalities.array.members import EXTENSIONS, array_of, check_values
from d2v_scale.modalities.speech.decoder import EXTENSIONS as RECORDINGS
from d2v_scale.model.stem_config import ArrayStem
from d2v_scale.shards.array_files import ArrayFile, open_npy
from d2v_scale.shards.reading import RawSample, SampleFault, SampleStore, Store
from d2v_scale.shards.rows import Row, Stacked

_LEAST_STD = 1e-30
"""What varies less is constant. Recordings in -1 ... 1 have a larger one, but values are in any unit here: microvolts
that are stored in volts have a variance of 1e-10."""

Values = NDArray[np.float32]


class Readable(Protocol):
    """An array that is read in part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, e_1 ... e_n)."""

    def whole(self) -> NDArray[Any]:
        """All of it, row-major."""

    def slice(self, axis: int, start: int, stop: int) -> NDArray[Any]:
        """Positions [start, stop) along one axis, row-major."""


class ArrayDecoder:
    """Samples to float32 (C, e_1 ... e_n), NaN where a value is missing; these to a batch."""

    def __init__(self, stem: ArrayStem, key: str) -> None:
        """`key`: where the stem's section stands in the recipe."""
        self.extensions: tuple[str, ...] = RECORDINGS if stem.reads_recordings else EXTENSIONS
        self._stem = stem
        self._key = key
        self._crops = any(axis.longer == "crop" for axis in stem.axes.values())
        self.draws = len(stem.axes)

    def training_row(self, store: Store, shard: int, item: int, length: int, draws: NDArray[np.float64]) -> Row:
        """The array, where it is longer than what is read a random part of it. Of a `.npy` that lies uncompressed in
        its tar no more than that part is read, unchecked: the index has one checksum for a whole sample."""
        del length
        if self._crops and not self._stem.reads_recordings and isinstance(store, SampleStore):
            extension, read_at, size = store.member(shard, item, EXTENSIONS)
            if extension == "npy":
                key = store.members(shard).key(item)
                try:
                    array = open_npy(read_at, size)
                    if self._is_longer(array):
                        return Row(key, self._read(array, draws))
                except ValueError as error:
                    fault = store.describe(shard, item, str(error))
                    raise SampleFault(fault.shard, fault.key, fault.reason) from error
        sample = store.read(shard, item)
        return Row(sample.key, self._of(sample, draws))

    def part_row(self, sample: RawSample, draws: NDArray[np.float64]) -> tuple[Values, bool]:
        """The array, where it is longer than what is read a random part of it, as `longer: crop` asks."""
        return self._of(sample, draws), False

    def evaluation_row(self, sample: RawSample) -> Values:
        """The array, or what is read of it from its middle."""
        return self._of(sample, np.full(self.draws, 0.5))

    def _of(self, sample: RawSample, draws: NDArray[np.float64]) -> Values:
        try:
            return self._read(self._array_of(sample), draws)
        except ValueError as error:
            raise sample.fault(str(error)) from error

    def _array_of(self, sample: RawSample) -> Readable:
        if self._stem.reads_recordings:
            return spectrum_of(sample, self._stem)
        extension, content = sample.member(EXTENSIONS)
        return array_of(extension, content, self._stem.key)

    def _is_longer(self, array: ArrayFile) -> bool:
        shape, extents = array.shape, self._stem.extents
        return len(shape) == len(extents) + 1 and any(a > b for a, b in zip(shape[1:], extents, strict=True))

    def _read(self, array: Readable, draws: NDArray[np.float64]) -> Values:
        """Raises ValueError for what this stem does not read."""
        shape = array.shape
        starts = self._starts(shape, draws)
        # Along one axis the file is read in part: where that leaves most of it unread.
        shares = [min(1.0, extent / held) for extent, held in zip(self._stem.extents, shape[1:], strict=True)]
        sliced = int(np.argmin(shares))
        cuts = [
            slice(start, start + min(extent, held))
            for start, extent, held in zip(starts, self._stem.extents, shape[1:], strict=True)
        ]
        if shares[sliced] < 1:
            read = array.slice(sliced + 1, cuts[sliced].start, cuts[sliced].stop)
            cuts[sliced] = slice(None)
        else:
            read = array.whole()
        with np.errstate(over="ignore"):
            values = read[(slice(None), *cuts)].astype(np.float32)
        self._check(values)
        return np.ascontiguousarray(self._normalised(self._transformed(values)))

    def _starts(self, shape: tuple[int, ...], draws: NDArray[np.float64]) -> list[int]:
        stem = self._stem
        named = " x ".join(stem.axes)
        if len(shape) != len(stem.axes) + 1 or shape[0] != stem.channels:
            raise ValueError(
                f"has the shape {shape}, but {self._key} has {stem.channels} channels and the axes {named}"
            )
        if 0 in shape:
            raise ValueError(f"has the shape {shape}, in which there is nothing")
        starts = []
        for (name, axis), held, draw in zip(stem.axes.items(), shape[1:], draws, strict=True):
            if held > axis.extent and axis.longer == "refuse":
                raise ValueError(
                    f"has {held} steps along {name}, more than {self._key}.axes.{name}.extent {axis.extent} "
                    f"(longer: crop would read a part)"
                )
            starts.append(int(draw * (max(0, held - axis.extent) + 1)))
        return starts

    def _check(self, values: Values) -> None:
        check_values(values)
        missing = int(np.isnan(values).sum())
        if missing and self._stem.missing == "refuse":
            raise ValueError(f"holds {missing} NaN of {values.size} values ({self._key}.missing is refuse)")
        if missing and self._missing(values).all():
            raise ValueError("has a NaN in every patch")

    def _transformed(self, values: Values) -> Values:
        match self._stem.transform:
            case "none" | "log_mel":  # a spectrum is one as it is read
                return values
            case "log":
                if (lowest := np.nanmin(values)) < 0:
                    raise ValueError(f"holds {lowest:g}, which has no logarithm ({self._key}.transform)")
                return np.log(np.maximum(values, np.float32(self._stem.log_floor)))

    def _normalised(self, values: Values) -> Values:
        axes = tuple(range(1, values.ndim))
        match self._stem.normalise:
            case "none":
                return values
            case "moments":
                broad = (-1, *[1] * len(axes))
                mean, std = (np.array(x, dtype=np.float32).reshape(broad) for x in (self._stem.mean, self._stem.std))
                return values * (1 / std) + (-mean / std)
            case "sample":
                return _standardised(values, (0, *axes))
            case "channel":
                return _standardised(values, axes)

    def _missing(self, values: Values) -> NDArray[np.bool_]:
        """bool, patches along each axis: those in which a value is missing."""
        patch = self._stem.patch
        missing = np.isnan(values).any(axis=0)
        missing = np.pad(missing, [(0, -held % size) for held, size in zip(missing.shape, patch, strict=True)])
        pairs = [n for held, size in zip(missing.shape, patch, strict=True) for n in (held // size, size)]
        within: tuple[int, ...] = tuple(range(1, 2 * len(patch), 2))
        return np.asarray(missing.reshape(pairs).any(axis=within))

    def stack(self, rows: list[Values], longest: int | None = None) -> Stacked:
        """float32 (B, C, E_1 ... E_n) of the longest extents, zero in what is padding or missing. `valid` is of
        patches: bool (B, T). What is left of a row behind its last whole patch is one more, filled with zeros."""
        del longest
        stem = self._stem
        inputs = np.zeros((len(rows), stem.channels, *stem.extents), dtype=np.float32)
        valid = np.zeros((len(rows), *stem.grid), dtype=bool)
        extents_bn = np.zeros((len(rows), len(stem.axes)), dtype=np.int64)
        missing = 0
        for k, row in enumerate(rows):
            extents_bn[k] = [-(-held // size) for held, size in zip(row.shape[1:], stem.patch, strict=True)]
            inputs[k][tuple(slice(held) for held in row.shape)] = row
            inside = tuple(slice(held) for held in extents_bn[k].tolist())
            lacking = self._missing(row)
            valid[k][inside] = ~lacking
            missing += int(lacking.sum())
        if missing:
            self._blank_missing(inputs, valid)
        valid_bt = valid.reshape(len(rows), -1)
        line = len(stem.axes) == 1
        whole = bool(valid_bt.all())
        return Stacked(
            torch.from_numpy(inputs),
            None if whole else torch.from_numpy(valid_bt),
            grid=None if line else stem.grid,
            length=stem.grid[0] if line else None,
            valid_lengths=None if whole else (extents_bn[:, 0] if line else extents_bn),
            real_bt=None if whole else valid_bt,
            missing=missing,
        )

    def _blank_missing(self, inputs: Values, valid: NDArray[np.bool_]) -> None:
        """Zero in patches with a missing value, in place: none of the values beside it is seen."""
        for axis, size in enumerate(self._stem.patch):
            valid = valid.repeat(size, axis=1 + axis)
        np.copyto(inputs, 0.0, where=~valid[:, None])

    def blank(self) -> Values:
        """A row of a batch that has none."""
        return np.zeros((self._stem.channels, *self._stem.extents), dtype=np.float32)


def _standardised(values: Values, axes: tuple[int, ...]) -> Values:
    """Mean 0 and variance 1 over these axes, of what is not missing. What is missing stays so; constants become 0."""
    there = ~np.isnan(values)
    count: Any = np.maximum(there.sum(axis=axes, keepdims=True), 1)
    mean = np.where(there, values, 0).sum(axis=axes, keepdims=True, dtype=np.float64) / count
    centred = values - mean.astype(np.float32)
    squares = np.square(np.where(there, centred, 0), dtype=np.float64)
    std = np.sqrt(squares.sum(axis=axes, keepdims=True) / count)
    return centred * np.where(std > _LEAST_STD, 1 / np.maximum(std, _LEAST_STD), 0).astype(np.float32)
