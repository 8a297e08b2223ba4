"""What is inside a shard: every sample's place, checksum and length, so that any sample is one read away.

A set of shards has one JSON index, `NAME.index.json`, with a line of totals per shard. The samples of a shard are in a
binary file beside it, read when the shard comes into use, so an index of 10^9 samples costs memory per shard only.
"""

import json
import mmap
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from d2v_scale.data.config import Modality
from d2v_scale.errors import DataError
from d2v_scale.files import file_sha256, temporary_name

FORMAT = 1
_NO_END = "ends without an end-of-archive mark"
_BLOCK = tarfile.BLOCKSIZE

Measure = Callable[[dict[str, bytes]], int]
"""A sample's members by extension to its length; raises where it cannot be decoded."""


@dataclass(kw_only=True)
class Members:
    """The samples of one shard, in the order of the tar. E extensions."""

    keys_n: NDArray[np.bytes_]
    start_n: NDArray[np.int64]
    """Where a sample's first tar header begins, bytes."""
    size_n: NDArray[np.int64]
    """From there to the end of its last member, bytes."""
    crc_n: NDArray[np.uint32]
    """CRC-32 of that range, headers included."""
    length_n: NDArray[np.int64]
    """speech: samples at 16 kHz; text: tokens; vision: 0. -1: it could not be read when the index was made."""
    extensions: list[str]
    offset_ne: NDArray[np.int64]
    """Where a member's data begins, counted from `start_n`, bytes."""
    member_size_ne: NDArray[np.int64]
    """Bytes of a member; -1: the sample does not have it."""

    def __len__(self) -> int:
        return len(self.start_n)

    def key(self, number: int) -> str:
        """A sample's key, to be shown: bytes that are not UTF-8 as \\xNN."""
        return self.keys_n[number].decode("utf-8", "backslashreplace")

    def save(self, path: Path) -> None:
        """Write to `path`, atomically."""
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, format=np.int64(FORMAT), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Members":
        """Read what `save` wrote. Raises DataError."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if int(arrays["format"]) != FORMAT:
                    raise DataError(f"{path} has index format {int(arrays['format'])}.", _REINDEX)
                values: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"The index {path} cannot be read: {error}.", _REINDEX) from error
        values["extensions"] = [str(extension) for extension in values["extensions"]]
        return cls(**values)


_REINDEX = "Make the index again with tools/index_shards.py."


@dataclass(kw_only=True)
class ShardEntry:
    """One shard in a set's index."""

    path: str
    """Relative to the index file, or absolute, or a URL or `pipe:` command."""
    members: str
    """The binary file with its samples, relative to the index file."""
    samples: int
    bytes: int
    sha256: str
    length: int = 0
    """Sum of the samples' lengths."""
    damage: list[str] = field(default_factory=list)
    """What was wrong with the shard when it was indexed."""


@dataclass(kw_only=True)
class SetIndex:
    """A set of shards: what `NAME.index.json` holds."""

    modality: Modality
    shards: list[ShardEntry]
    classes: list[str] = field(default_factory=list)
    """Names of the labels in `.cls`; empty: no labels."""
    tokenizer: str | None = None
    """Sentencepiece model that the token counts are of, relative to the index file."""
    tokenizer_sha256: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that were left out when the shards were written, with the reason (the first thousand)."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def save(self, path: Path) -> None:
        """Write to `path`, atomically."""
        totals = {
            "samples": self.samples,
            "bytes": sum(shard.bytes for shard in self.shards),
            "length": sum(shard.length for shard in self.shards),
            "length_unit": {"speech": "samples at 16 kHz", "text": "tokens", "vision": "none"}[self.modality],
        }
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "totals": totals} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SetIndex":
        """Read what `save` wrote. Raises DataError."""
        try:
            values = json.loads(Path(path).read_text())
            if values.pop("format") != FORMAT:
                raise DataError(f"{path} has another index format.", _REINDEX)
            values.pop("totals")
            values["shards"] = [ShardEntry(**shard) for shard in values["shards"]]
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"The index {path} cannot be read: {error}.", _REINDEX) from error


class atomic_file:
    """`with atomic_file(path) as temporary:` renames `temporary` to `path` if the block succeeds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_name(path)

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def index_tar(path: Path, measure: Measure | None = None) -> tuple[Members, list[str]]:
    """The samples of a tar, and what is wrong with it, named.

    After a damaged header the reading goes on at the next sound one. A sample whose members were cut off or that
    `measure` cannot decode is in the index with length -1, so that it is counted as lost and not forgotten.
    """
    damage: list[str] = []
    samples: list[tuple[str, int, int, int, int]] = []
    places: list[dict[str, tuple[int, int]]] = []
    extensions: dict[str, None] = {}
    if path.stat().st_size == 0:
        return _to_members([], [], []), [f"{path.name} is empty"]
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for key, group in _group(_headers(stream, len(content), damage)):
            start = group[0][1].offset
            end = max(info.offset_data + info.size for _, info in group)
            length = 0
            if end > len(content):
                damage.append(f"{path.name}: {shown(key)} is cut off at the end of the file")
                length, end = -1, len(content)
            elif measure is not None:
                data = {ext: content[info.offset_data : info.offset_data + info.size] for ext, info in group}
                try:
                    length = measure(data)
                except Exception as error:
                    damage.append(f"{path.name}: {shown(key)}: {error}")
                    length = -1
            samples.append((key, start, end - start, zlib.crc32(memoryview(content)[start:end]), length))
            places.append({ext: (info.offset_data - start, info.size) for ext, info in group})
            extensions.update(dict.fromkeys(places[-1]))
        # The last sample of a tar without its end may have lost members: it is whole if it looks like the one before.
        if _NO_END in damage and len(samples) > 1 and places[-1].keys() != places[-2].keys():
            samples[-1] = (*samples[-1][:4], -1)
    return _to_members(samples, places, list(extensions)), damage


def shown(name: str) -> str:
    """A name from a tar, to be shown: bytes that are not UTF-8 as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _headers(stream: Any, size: int, damage: list[str]) -> Iterator[tarfile.TarInfo | None]:
    """Regular files of a tar; None where something was skipped, so that no sample spans the gap."""
    position = 0
    while position < size:
        stream.seek(position)
        try:
            tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115
            for info in tar:
                position = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                if info.isreg():
                    yield info
                tar.members = []  # type: ignore[attr-defined]
            position = max(position, tar.offset)
        except tarfile.TarError:
            pass
        stream.seek(position)
        if position < size and stream.read(_BLOCK) == bytes(_BLOCK):
            return
        if position < size:
            damage.append(f"damaged tar header at byte {position}")
            yield None
            position = _next_sound_header(stream, position + _BLOCK, size)
    damage.append(_NO_END)


def _next_sound_header(stream: Any, position: int, size: int) -> int:
    while position < size:
        stream.seek(position)
        try:
            tarfile.TarInfo.frombuf(stream.read(_BLOCK), "utf-8", "surrogateescape")
            return position
        except tarfile.TarError:
            position += _BLOCK
    return size


def _group(
    headers: Iterator[tarfile.TarInfo | None],
) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
    """Consecutive files with the same key are one sample (WebDataset's layout)."""
    current: str | None = None
    group: list[tuple[str, tarfile.TarInfo]] = []
    for info in headers:
        key, extension = base_plus_ext(info.name) if info is not None else (None, None)
        if info is not None and key is None:
            continue
        if key != current or info is None:
            if group and current is not None:
                yield current, group
            current, group = key, []
        if info is not None and extension is not None:
            group.append((extension.lower(), info))
    if group and current is not None:
        yield current, group


def _to_members(
    samples: list[tuple[str, int, int, int, int]], places: list[dict[str, tuple[int, int]]], extensions: list[str]
) -> Members:
    keys, starts, sizes, crcs, lengths = zip(*samples, strict=True) if samples else ((), (), (), (), ())
    missing = (0, -1)
    table = np.array([[place.get(ext, missing) for ext in extensions] for place in places], dtype=np.int64)
    table = table.reshape(len(samples), len(extensions), 2)
    return Members(
        keys_n=np.array([key.encode("utf-8", "surrogateescape") for key in keys] or [b""][:0], dtype=np.bytes_),
        start_n=np.array(starts, dtype=np.int64),
        size_n=np.array(sizes, dtype=np.int64),
        crc_n=np.array(crcs, dtype=np.uint32),
        length_n=np.array(lengths, dtype=np.int64),
        extensions=extensions,
        offset_ne=table[:, :, 0],
        member_size_ne=table[:, :, 1],
    )


def index_shard(tar: Path, members: Path, relative_to: Path, measure: Measure | None = None) -> ShardEntry:
    """Index one local tar: write its `members` file and return its entry."""
    found, damage = index_tar(tar, measure)
    found.save(members)
    return ShardEntry(
        path=os.path.relpath(tar, relative_to),
        members=os.path.relpath(members, relative_to),
        samples=len(found),
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        length=int(found.length_n.clip(min=0).sum()),
        damage=damage,
    )
