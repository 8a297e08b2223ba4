"""Samples as bytes: one positioned read each, checked against the index. Every failure has a shard and a reason."""

import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from d2v_scale.data.fetching import ShardCache
from d2v_scale.data.shard_index import Members
from d2v_scale.data.shard_set import ShardSet, is_remote
from d2v_scale.errors import DataError


@dataclass(frozen=True)
class Fault:
    """A sample that could not be delivered."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}" if self.key else f"{self.shard}: {self.reason}"


class SampleFault(Exception):
    """Raised for one unreadable sample; the batch goes on without it."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: {key}: {reason}")
        self.fault = Fault(shard, key, reason)


class RawSample:
    """The members of one sample, not decoded."""

    def __init__(self, shard: str, key: str, content: bytes, members: Members, number: int) -> None:
        self.shard = shard
        self.key = key
        self._content = memoryview(content)
        self._members = members
        self._number = number

    def member(self, extensions: tuple[str, ...]) -> tuple[str, memoryview]:
        """The first member with one of `extensions`, and its extension. Raises SampleFault."""
        members = self._members
        for column, extension in enumerate(members.extensions):
            size = int(members.member_size_ne[self._number, column])
            if size >= 0 and extension in extensions:
                if size == 0:
                    raise self.fault(f"its .{extension} is empty")
                start = int(members.offset_ne[self._number, column])
                return extension, self._content[start : start + size]
        raise self.fault(f"has no .{', .'.join(extensions)}")

    def has(self, extension: str) -> bool:
        """True when the sample has such a member."""
        members = self._members
        if extension not in members.extensions:
            return False
        return bool(members.member_size_ne[self._number, members.extensions.index(extension)] >= 0)

    def fault(self, reason: str) -> SampleFault:
        """What to raise when this sample cannot be used."""
        return SampleFault(self.shard, self.key, reason)


def checked_sample(shard: str, content: bytes, members: Members, number: int) -> RawSample:
    """The sample `number`, whose bytes should be `content`. Raises SampleFault where they are not what was indexed."""
    key, size = members.key(number), int(members.size_n[number])
    if len(content) < size:
        raise SampleFault(shard, key, f"cut off: {len(content)} of {size} bytes are there")
    if zlib.crc32(content) != members.crc_n[number]:
        raise SampleFault(shard, key, "its checksum is not the index's")
    return RawSample(shard, key, content, members, number)


class Store(Protocol):
    """Where decoders get samples from."""

    def read(self, shard: int, number: int) -> RawSample:
        """The sample `number` of `shard`. Raises SampleFault."""

    def describe(self, shard: int, number: int, reason: str) -> Fault:
        """A fault of a sample that could be read but not used."""


class SampleStore:
    """Reads samples of one set of shards. One per process; keeps recently used shards open."""

    def __init__(self, shards: ShardSet, cache: ShardCache | None = None, keep: int = 64) -> None:
        """`cache` brings shards that are not local to a local path; `keep`: how many shards stay open."""
        self._keep = keep
        self._shards = shards
        self._cache = cache
        self._open: OrderedDict[int, tuple[int, Members]] = OrderedDict()

    def members(self, shard: int) -> Members:
        """The index of a shard."""
        return self._opened(shard)[1]

    def sha256(self, shard: int) -> str:
        """The checksum that the index has of a shard."""
        return self._shards.entries[shard].sha256

    def read(self, shard: int, number: int) -> RawSample:
        """The sample `number` of `shard`. Raises SampleFault; never returns part of a sample."""
        name = self._shards.paths[shard]
        descriptor, members = self._opened(shard)
        key = members.key(number)
        size = int(members.size_n[number])
        if members.length_n[number] < 0:
            raise SampleFault(name, key, "was cut off or undecodable when the index was made")
        try:
            content = os.pread(descriptor, size, int(members.start_n[number]))
        except OSError as error:
            raise SampleFault(name, key, f"cannot be read: {error.strerror}") from error
        return checked_sample(name, content, members, number)

    def _opened(self, shard: int) -> tuple[int, Members]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        name = self._shards.paths[shard]
        try:
            members = self._shards.members(shard)
            if not is_remote(name):
                path = name
            else:
                assert self._cache is not None, "shards that are not local need a cache"
                entry = self._shards.entries[shard]
                path = self._cache.fetch(name, entry.bytes, entry.sha256)
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC), members
        except OSError as error:
            raise SampleFault(name, "", f"cannot be opened: {error.strerror or error}") from error
        except DataError as error:
            raise SampleFault(name, "", str(error)) from error
        self._open[shard] = opened
        if len(self._open) > self._keep:
            _, (descriptor, _) = self._open.popitem(last=False)
            os.close(descriptor)
        return opened

    def close(self) -> None:
        """Close every shard."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def describe(self, shard: int, number: int, reason: str) -> Fault:
        """A fault of a sample that could be read but not used."""
        key = self.members(shard).key(number)
        return Fault(self._shards.paths[shard], key, reason)
