"""What the arrays of shards are like: shapes, types, missing values, moments."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2v_scale.conversion.array_layouts import Place, array_at, headers, places
from d2v_scale.conversion.array_members import Layout
from d2v_scale.data.config import DataConfig
from d2v_scale.data.source import open_store
from d2v_scale.errors import DataError
from d2v_scale.modalities.array.log_mel import spectrum_of
from d2v_scale.model.stem_config import ArrayStem
from d2v_scale.shards.array_files import ArrayHeader
from d2v_scale.shards.reading import SampleFault, SampleStore
from d2v_scale.shards.shard_set import ShardSet

_READ = 1000
"""Samples whose values are read to say how many are missing."""
_NAMED = 5
Channels = NDArray[np.float64]


def tell(shards: ShardSet, key: str | None = None) -> None:
    """Print channels and axes, the range of each axis, types, and how many values are missing. `key`: of the array in
    each `.npz`."""
    found = list(headers(shards, key))
    layouts = Counter(Layout(header.shape[0], len(header.shape) - 1) for _, header in found if header.shape)
    if not layouts:
        print("no sample has an array that can be read; where .npz hold several, name one with --key")
        return
    [(usual, count), *others] = layouts.most_common()
    print(f"shapes: {usual} in {count} samples")
    of_usual = [header for _, header in found if _has(header, usual)]
    extents_na = np.array([header.shape[1:] for header in of_usual])
    for axis, extent_n in enumerate(extents_na.T, start=1):
        print(f"  axis {axis}: {extent_n.min()} to {extent_n.max()}, median {np.median(extent_n):g}")
    for layout, count in others:
        place = next(place for place, header in found if _has(header, layout))
        print(f"  {layout} in {count} samples, which a model of the others loses; the first: {_named(shards, place)}")
    types = Counter(header.dtype.newbyteorder("=").name for _, header in found)
    print(f"types: {', '.join(f'{name} in {held} samples' for name, held in types.most_common())}")
    _tell_missing(shards, [place for place, header in found if _has(header, usual)], usual.channels, key)


def _has(header: ArrayHeader, layout: Layout) -> bool:
    return (header.shape[:1], len(header.shape) - 1) == ((layout.channels,), layout.axes)


def _named(shards: ShardSet, place: Place) -> str:
    return f"{shards.members(place.shard).key(place.number)} of {shards.paths[place.shard]}"


def _tell_missing(shards: ShardSet, held: list[Place], channels: int, key: str | None) -> None:
    chosen = sorted(np.random.default_rng(0).permutation(len(held))[:_READ])
    missing_c, values, lacking = np.zeros(channels), 0, 0
    for _, array in arrays(shards, [held[k] for k in chosen], key):
        nan_c = np.isnan(array.reshape(channels, -1)).sum(axis=1) if array.dtype.kind == "f" else np.zeros(channels)
        missing_c, values, lacking = missing_c + nan_c, values + array.size, lacking + int(nan_c.any())
    share = missing_c.sum() / max(1, values)
    print(f"missing values (NaN): {share:.3%}, in {lacking} of {len(chosen)} samples that were read")
    if lacking and channels > 1:
        most = np.argsort(-missing_c, kind="stable")[:_NAMED]
        shares = (f"{channel + 1}: {missing_c[channel] * channels / values:.3%}" for channel in most)
        print(f"  channels that lack most, from 1: {', '.join(shares)}")


def arrays(shards: ShardSet, chosen: list[Place], key: str | None = None) -> Iterator[tuple[Place, NDArray]]:
    """The arrays of these samples; those that cannot be read are named and left out."""
    store = open_store(shards, DataConfig())
    try:
        for place in chosen:
            try:
                array = _read(store, place, key)
            except (SampleFault, ValueError) as error:
                print(f"left out: {_named(shards, place)}: {error}", file=sys.stderr)
                continue
            yield place, array
    finally:
        store.close()


def _read(store: SampleStore, place: Place, key: str | None) -> NDArray:
    return array_at(store, place, key).whole()


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of each channel, of what is no NaN."""

    count_c: Channels
    mean_c: Channels
    squares_c: Channels

    @classmethod
    def of(cls, array: NDArray) -> "Moments":
        """Of an array (C, ...), in two passes, in float64."""
        values_cn = array.reshape(len(array), -1).astype(np.float64)
        there_cn = ~np.isnan(values_cn)
        count_c = there_cn.sum(axis=1).astype(np.float64)
        mean_c = np.where(there_cn, values_cn, 0).sum(axis=1) / np.maximum(count_c, 1)
        centred_cn = np.where(there_cn, values_cn - mean_c[:, None], 0)
        return cls(count_c, mean_c, np.square(centred_cn).sum(axis=1))

    def merged(self, other: "Moments") -> "Moments":
        """Of both together (Chan, Golub and LeVeque 1983): exact, however far the mean is from 0."""
        count_c = self.count_c + other.count_c
        apart_c = other.mean_c - self.mean_c
        share_c = other.count_c / np.maximum(count_c, 1)
        squares_c = self.squares_c + other.squares_c + np.square(apart_c) * self.count_c * share_c
        return Moments(count_c, self.mean_c + apart_c * share_c, squares_c)

    @property
    def std_c(self) -> Channels:
        """Standard deviation of each channel: the root of the mean squared deviation."""
        return np.sqrt(self.squares_c / np.maximum(self.count_c, 1))


def moments(shards: ShardSet, transform: str, log_floor: float, key: str | None = None) -> Moments:
    """Of all samples that have what most have, after `transform` as model.arrays.NAME.transform. Raises DataError where
    there is none. Who has other channels or axes, or what has no logarithm, is named and left out."""
    found = list(headers(shards, key))
    usual = Counter((*header.shape[:1], len(header.shape)) for _, header in found).most_common(1)
    total: Moments | None = None
    for place, array in arrays(shards, places(shards), key):
        if (*array.shape[:1], array.ndim) != usual[0][0]:
            print(f"left out: {_named(shards, place)}: has the shape {array.shape}", file=sys.stderr)
            continue
        if transform == "log":
            if (lowest := np.nanmin(array)) < 0:
                print(f"left out: {_named(shards, place)}: holds {lowest:g}, which has no logarithm", file=sys.stderr)
                continue
            array = np.log(np.maximum(array.astype(np.float64), log_floor))
        here = Moments.of(array)
        total = here if total is None else total.merged(here)
    if total is None:
        raise _nothing_measured()
    return total


def moments_of_spectra(shards: ShardSet, stem: ArrayStem) -> Moments:
    """Of the log-mel energies of all recordings, each as a whole, as `stem` makes them. Raises DataError where there is
    none. What cannot be read is named and left out."""
    total: Moments | None = None
    store = open_store(shards, DataConfig())
    try:
        for place in places(shards):
            try:
                here = Moments.of(spectrum_of(store.read(*place), stem).whole())
            except (SampleFault, ValueError) as error:
                print(f"left out: {_named(shards, place)}: {error}", file=sys.stderr)
                continue
            total = here if total is None else total.merged(here)
    finally:
        store.close()
    if total is None:
        raise _nothing_measured()
    return total


def _nothing_measured() -> DataError:
    return DataError("No sample has values whose moments could be measured.")


def print_moments(shards: ShardSet, transform: str, log_floor: float, key: str | None = None) -> None:
    """Print what a recipe has of them. Raises DataError."""
    if log_floor <= 0:
        raise DataError(f"--log_floor {log_floor:g} has no logarithm.", "Give a number above 0.")
    before = "" if transform == "none" else f"transform: {transform}\nlog_floor: {log_floor!r}\n"
    _print(moments(shards, transform, log_floor, key), before)


def print_moments_of_spectra(shards: ShardSet, stem: ArrayStem) -> None:
    """Print what a recipe with the stem `stem` has of recordings. Raises DataError."""
    _print(moments_of_spectra(shards, stem), "transform: log_mel\n")


def _print(found: Moments, before: str) -> None:
    constant = found.squares_c == 0
    if constant.any():
        named = ", ".join(str(channel + 1) for channel in np.flatnonzero(constant))
        print(f"channels {named} (from 1) do not vary: their deviation is written as 1", file=sys.stderr)
    std_c = np.where(constant, 1.0, found.std_c)
    print(f"# model.arrays.NAME:\n{before}normalise: moments")
    for name, values in (("mean", found.mean_c), ("std", std_c)):
        print(f"{name}: [{', '.join(_number(value) for value in values)}]")


def _number(value: float) -> str:
    """With the digits of float32, as a number that YAML takes for one."""
    text = f"{value:.9g}"
    mantissa, exponent, power = text.partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}{exponent}{power}"
