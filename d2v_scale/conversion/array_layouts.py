"""What the arrays of shards are, from their headers."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from d2v_scale.conversion.array_members import Layout
from d2v_scale.data.config import DataConfig
from d2v_scale.data.source import open_store
from d2v_scale.modalities.array.members import EXTENSIONS, array_of, header_of
from d2v_scale.shards.array_files import ArrayFile, ArrayHeader, open_npy
from d2v_scale.shards.reading import SampleFault, SampleStore
from d2v_scale.shards.shard_set import ShardSet


def layout_of(members: Mapping[str, bytes], key: str | None = None) -> Layout:
    """Of a sample's array. Raises ValueError."""
    extension = next(extension for extension in EXTENSIONS if extension in members)
    return Layout.of(header_of(extension, members[extension], key).shape)


class Place(NamedTuple):
    """Where a sample is in a set."""

    shard: int
    number: int


def places(shards: ShardSet) -> list[Place]:
    """All samples that could be read when they were indexed."""
    return [
        Place(shard, int(number))
        for shard in range(len(shards.paths))
        for number in (shards.members(shard).length_n >= 0).nonzero()[0]
    ]


def header_at(store: SampleStore, place: Place, key: str | None = None) -> ArrayHeader:
    """What the array of a sample is; of a `.npy` that lies in one piece its first bytes alone are read. `key`: of the
    array in a `.npz`. Raises SampleFault and ValueError."""
    extension, read_at, size = store.member(*place, EXTENSIONS)
    return open_npy(read_at, size).header if extension == "npy" else header_of(extension, read_at(0, size), key)


def array_at(store: SampleStore, place: Place, key: str | None = None) -> ArrayFile:
    """The array of a sample, its checksum compared. Raises SampleFault and ValueError."""
    return array_of(*store.read(*place).member(EXTENSIONS), key)


def headers(shards: ShardSet, key: str | None = None) -> Iterator[tuple[Place, ArrayHeader]]:
    """Those of all samples that can be read."""
    store = open_store(shards, DataConfig())
    try:
        for place in places(shards):
            try:
                yield place, header_at(store, place, key)
            except (SampleFault, ValueError):  # said by the check of all samples
                continue
    finally:
        store.close()


def first_layout(shards: ShardSet, key: str | None = None) -> Layout | None:
    """Channels and axes of the first sample that has some."""
    for _, header in headers(shards, key):
        try:
            return Layout.of(header.shape)
        except ValueError:
            continue
    return None
