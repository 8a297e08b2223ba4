"""Samples as bytes: one positioned read each, checked against the index. Every failure has a shard and a reason."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from d2v_scale.errors import DataError, as_it_was
from d2v_scale.shards.fetching import ShardCache
from d2v_scale.shards.patterns import is_remote
from d2v_scale.shards.shard_index import Members
from d2v_scale.shards.shard_set import ShardSet

_BLOCK, _TYPE, _SPARSE = 512, 156, b"S"
"""Of a tar header: its size, where its type stands, and the type of GNU's sparse files."""
_READ_AT_ONCE = 1 << 30


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

    def __reduce__(self) -> tuple[Any, ...]:
        return as_it_was(self)


class NothingHere(Exception):
    """Raised where a reader's share of the shards holds nothing: its rows stay blank, and none is lost."""


class RawSample:
    """The members of one sample, not decoded."""

    def __init__(
        self,
        shard: str,
        key: str,
        content: bytes,
        members: Members,
        number: int,
        assembled: dict[int, bytes] | None = None,
    ) -> None:
        """`assembled`: members that do not lie in one piece in `content`, by column."""
        self.shard = shard
        self.key = key
        self._content = memoryview(content)
        self._members = members
        self._number = number
        self._assembled = assembled or {}

    def member(self, extensions: tuple[str, ...]) -> tuple[str, memoryview]:
        """The first member with one of `extensions`, and its extension. Raises SampleFault."""
        members = self._members
        for column, extension in enumerate(members.extensions):
            size = int(members.member_size_ne[self._number, column])
            if size >= 0 and extension in extensions:
                if size == 0:
                    raise self.fault(f"its .{extension} is empty")
                return extension, self._content_of(column, size)
        raise self.fault(f"has no .{', .'.join(extensions)}")

    def members(self) -> dict[str, bytes]:
        """All members, by extension."""
        size_e = self._members.member_size_ne[self._number].tolist()
        held = [(column, size) for column, size in enumerate(size_e) if size >= 0]
        return {self._members.extensions[column]: bytes(self._content_of(column, size)) for column, size in held}

    def _content_of(self, column: int, size: int) -> memoryview:
        if column in self._assembled:
            return memoryview(self._assembled[column])
        start = int(self._members.offset_ne[self._number, column])
        return self._content[start : start + size]

    def has(self, extension: str) -> bool:
        """True when the sample has such a member."""
        members = self._members
        if extension not in members.extensions:
            return False
        return bool(members.member_size_ne[self._number, members.extensions.index(extension)] >= 0)

    def fault(self, reason: str) -> SampleFault:
        """What to raise when this sample cannot be used."""
        return SampleFault(self.shard, self.key, reason)


ReadAt = Callable[[int, int], bytes]
"""Bytes of a shard from a place on; fewer at its end. Raises OSError."""


def read_sample(shard: str, read_at: ReadAt, members: Members, number: int) -> RawSample:
    """The sample `number` of a shard. Raises SampleFault where its bytes are not what was indexed."""
    key, start, size = members.key(number), int(members.start_n[number]), int(members.size_n[number])
    if members.length_n[number] < 0:
        raise SampleFault(shard, key, "was cut off or undecodable when the index was made")
    try:
        content = read_at(start, size)
        if len(content) < size:
            raise SampleFault(shard, key, f"cut off: {len(content)} of {size} bytes are there")
        checksum = zlib.crc32(content)
        assembled: dict[int, bytes] = {}
        if len(members.pieces_p5):
            checksum, assembled = _assemble(read_at, content, checksum, members, number)
    except OSError as error:
        raise SampleFault(shard, key, f"cannot be read: {error.strerror or error}") from error
    if checksum != members.crc_n[number]:
        raise SampleFault(shard, key, "its checksum is not the index's")
    if members.format == 1 and _holds_sparse(content, members, number):
        raise SampleFault(shard, key, "is stored sparse, and its index is of an earlier version: make it again")
    return RawSample(shard, key, content, members, number, assembled)


def _assemble(
    read_at: ReadAt, content: bytes, checksum: int, members: Members, number: int
) -> tuple[int, dict[int, bytes]]:
    """Links and sparse members of a sample, and the checksum continued over what lies elsewhere."""
    columns = np.flatnonzero((members.offset_ne[number] < 0) & (members.member_size_ne[number] >= 0)).tolist()
    whole = {column: bytearray(int(members.member_size_ne[number, column])) for column in columns}
    first, last = np.searchsorted(members.pieces_p5[:, 0], [number, number + 1]).tolist()
    for _, column, offset, size, position in members.pieces_p5[first:last].tolist():
        if offset >= 0 and offset + size <= len(content):
            piece = content[offset : offset + size]
        else:
            piece = read_at(int(members.start_n[number]) + offset, size)
            checksum = zlib.crc32(piece, checksum)
        whole[column][position : position + size] = piece
    return checksum, {column: bytes(value) for column, value in whole.items()}


def _holds_sparse(content: bytes, members: Members, number: int) -> bool:
    """Whether the headers of the sample say that a member is stored sparse, which format 1 took for its content."""
    places = np.stack((members.offset_ne[number], members.member_size_ne[number]), axis=1)
    behind = 0
    for offset, size in sorted(places[places[:, 1] >= 0].tolist()):
        headers = content[behind:offset]
        if b"GNU.sparse." in headers or headers[-_BLOCK:][_TYPE : _TYPE + 1] == _SPARSE:
            return True
        behind = offset + size
    return False


class Store(Protocol):
    """Where decoders get samples from."""

    def read(self, shard: int, number: int) -> RawSample:
        """The sample `number` of `shard`. Raises SampleFault, and NothingHere."""

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
        descriptor, members = self._opened(shard)
        return read_sample(self._shards.paths[shard], partial(_pread, descriptor), members, number)

    def member(self, shard: int, number: int, extensions: tuple[str, ...]) -> tuple[str, ReadAt, int]:
        """The first member of a sample with one of `extensions`: its extension, what reads bytes of it from a place on,
        and its size. Where it lies in one piece nothing is read yet, and what is read is not checked: the index has one
        checksum for a whole sample. Raises SampleFault."""
        descriptor, members = self._opened(shard)
        name, key = self._shards.paths[shard], members.key(number)
        if members.length_n[number] < 0:
            raise SampleFault(name, key, "was cut off or undecodable when the index was made")
        found = next(
            (
                column
                for column, one in enumerate(members.extensions)
                if one in extensions and members.member_size_ne[number, column] > 0
            ),
            None,
        )
        if found is None or members.offset_ne[number, found] < 0 or members.format == 1:
            extension, content = self.read(shard, number).member(extensions)
            return extension, lambda start, size: bytes(content[start : start + size]), len(content)
        first = int(members.start_n[number] + members.offset_ne[number, found])
        held = int(members.member_size_ne[number, found])

        def read_at(start: int, size: int) -> bytes:
            try:
                return _pread(descriptor, first + start, max(0, min(size, held - start)))
            except OSError as error:
                raise SampleFault(name, key, f"cannot be read: {error.strerror or error}") from error

        return members.extensions[found], read_at, held

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


def _pread(descriptor: int, start: int, size: int) -> bytes:
    """`size` bytes from `start` on, or what there is of them."""
    content = os.pread(descriptor, min(size, _READ_AT_ONCE), start)
    if len(content) == size or len(content) < _READ_AT_ONCE:
        return content
    parts = [content]
    while parts[-1] and (missing := size - sum(map(len, parts))):  # a system call reads 2 GiB at most
        parts.append(os.pread(descriptor, min(missing, _READ_AT_ONCE), start + size - missing))
    return b"".join(parts)
