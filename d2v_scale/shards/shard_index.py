"""What is inside a shard: every sample's place, checksum and length, so that any sample is one read away.

A set of shards has one JSON index, `NAME.index.json`, with a line of totals per shard. The samples of a shard are in a
binary file beside it, read when the shard comes into use, so an index of 10^9 samples costs memory per shard only.
"""

import json
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2v_scale.errors import DataError
from d2v_scale.files import atomic_file, file_sha256
from d2v_scale.shards.content import CONTENTS, WORDS, Content, length_of
from d2v_scale.shards.tar_members import NO_END, PassedOver, Piece, compression_of, shown, tar_members
from d2v_scale.shards.tar_samples import TarSample, tar_samples

FORMAT = 2
"""1: knew of no pieces, took lengths from headers, and did not say what it passed over. It is still read."""
_READ_FORMATS = (1, FORMAT)
LONGEST = 1 << 40
"""A greater length of a sample is none that was read (FLACs say 2^63 - 1 where they do not know theirs)."""

_NAMED = 100
"""Lines of damage that a shard's entry holds."""

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
    """Where a member's data begins, counted from `start_n`, bytes; -1: `pieces_p5` says where it lies."""
    member_size_ne: NDArray[np.int64]
    """Bytes of a member; -1: the sample does not have it."""
    pieces_p5: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 5), dtype=np.int64))
    """Of links and sparse members: sample, extension, where a piece begins counted from `start_n`, its bytes, and where
    it belongs in the member, which is zero elsewhere. `crc_n` goes on over the pieces that are not in its range."""
    beside_nc: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    """As `length_n`, of what samples hold beside it: a column for each of the set's `SetIndex.beside`."""
    format: int = FORMAT
    """Of the file that it was read from."""

    def __len__(self) -> int:
        return len(self.start_n)

    def key(self, number: int) -> str:
        """A sample's key, to be shown: bytes that are not UTF-8 as \\xNN."""
        return self.keys_n[number].decode("utf-8", "backslashreplace")

    def save(self, path: Path) -> None:
        """Write to `path`, atomically."""
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Members":
        """Read what `save` wrote. Raises DataError."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if int(arrays["format"]) not in _READ_FORMATS:
                    raise DataError(f"{path} has index format {int(arrays['format'])}.", _REINDEX)
                values: dict[str, Any] = {
                    f.name: arrays[f.name] for f in fields(cls) if f.name in arrays or f.name not in _ADDED_LATER
                }
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"The index {path} cannot be read: {error}.", _REINDEX) from error
        values["extensions"] = [str(extension) for extension in values["extensions"]]
        values["format"] = int(values["format"])
        for name in ("length_n", "beside_nc"):
            if name in values:
                values[name] = np.where((values[name] < 0) | (values[name] > LONGEST), -1, values[name])
        return cls(**values)


_ADDED_LATER = ("pieces_p5", "beside_nc")
_REINDEX = "Make the index again with `d2v index`."


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
    lost: int = 0
    """Samples that could not be read then, and have no length. Not known of indexes of format 1."""
    passed_over: list[str] = field(default_factory=list)
    """What it holds that is no part of a sample, by kind: how many, and the first."""
    length_beside: list[int] = field(default_factory=list)
    """As `length`, of each of the set's `SetIndex.beside`."""
    lost_beside: list[int] = field(default_factory=list)
    """As `lost`, of each of these."""


@dataclass(kw_only=True)
class SetIndex:
    """A set of shards: what `NAME.index.json` holds."""

    content: Content
    """What every sample is."""
    beside: list[Content] = field(default_factory=list)
    """What every sample holds beside it, in further members."""
    shards: list[ShardEntry]
    classes: list[str] = field(default_factory=list)
    """Names of the labels in `.cls`; empty: no labels."""
    tokenizer: str | None = None
    """Tokenizer that the token counts are of, relative to the index file."""
    tokenizer_sha256: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that were left out when the shards were written, with the reason (the first thousand)."""
    format: int = FORMAT
    """Of the file that it was read from."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def contents(self) -> list[Content]:
        """All that every sample holds."""
        return [self.content, *self.beside]

    def save(self, path: Path) -> None:
        """Write to `path`, atomically."""
        totals = {
            "samples": self.samples,
            "bytes": sum(shard.bytes for shard in self.shards),
            "length": sum(shard.length for shard in self.shards),
            "length_unit": length_of(self.content).unit,
        }
        with atomic_file(path) as temporary:
            values = {"format": self.format, "totals": totals} | self._values()
            temporary.write_text(json.dumps(values, indent=1) + "\n")

    def _values(self) -> dict[str, Any]:
        values = asdict(self)
        if not self.beside:  # earlier versions read the indexes of what they can read
            del values["beside"]
            for shard in values["shards"]:
                del shard["length_beside"], shard["lost_beside"]
        return values

    @classmethod
    def load(cls, path: str | Path) -> "SetIndex":
        """Read what `save` wrote. Raises DataError."""
        try:
            values = json.loads(Path(path).read_text())
            if values["format"] not in _READ_FORMATS:
                raise DataError(f"{path} has another index format.", _REINDEX)
            values.pop("totals")
            if "content" not in values:  # of an earlier version, which named the stem
                word = values.pop("modality")
                values["content"] = WORDS.get(word, word)
            for content in (values["content"], *values.get("beside", [])):
                if content not in CONTENTS:
                    known = ", ".join(CONTENTS)
                    raise DataError(f"{path} is of shards of {content!r}, which is none of {known}.", _REINDEX)
            values["shards"] = [ShardEntry(**shard) for shard in values["shards"]]
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"The index {path} cannot be read: {error}.", _REINDEX) from error


class TarContents(NamedTuple):
    """What is in a tar."""

    members: Members
    damage: list[str]
    """What is wrong with it, in words."""
    passed_over: list[str]
    """What is no part of a sample, by kind: how many, and the first."""


def index_tar(path: Path, measure: Measure | None = None, beside: dict[Content, Measure] | None = None) -> TarContents:
    """The samples of a tar, and what is wrong with it, named. Raises DataError for one that is compressed.

    After a damaged header the reading goes on at the next sound one. A sample that cannot be had whole or that
    `measure` cannot decode is in the index with length -1, so that it is counted as lost and not forgotten. `beside`:
    what measures the further contents of the samples, each of which may be lost by itself.
    """
    damage: list[str] = []
    passed_over = PassedOver()
    beside = beside or {}
    if path.stat().st_size == 0:
        return TarContents(_to_members([], [], [], len(beside)), ["the file is empty"], [])
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        samples = list(tar_samples(tar_members(content, damage, passed_over), passed_over))
        if not samples and (compression := compression_of(content[:8])):
            raise DataError(
                f"{path} is compressed ({compression}): no sample of it can be read by itself.", "Decompress the tar."
            )
        _lose_last_if_cut(samples, damage)
        extensions = list(dict.fromkeys(extension for sample in samples for extension in sample.members))
        rows = [_measured(content, sample, extensions, measure, beside) for sample in samples]
    damage += [f"{shown(sample.key)}: {sample.unreadable}" for sample in samples if sample.unreadable]
    damage += [f"{shown(sample.key)}: {line}" for sample, row in zip(samples, rows, strict=True) for line in row.faults]
    if len(damage) > _NAMED:
        damage[_NAMED:] = [f"and {len(damage) - _NAMED} more"]
    return TarContents(_to_members(samples, rows, extensions, len(beside)), damage, passed_over.lines())


def _lose_last_if_cut(samples: list[TarSample], damage: list[str]) -> None:
    """The last sample of a tar without its end may have lost members: it is whole if it looks like the one before."""
    if NO_END in damage and len(samples) > 1 and samples[-1].members.keys() != samples[-2].members.keys():
        samples[-1].lose("may have lost members: the tar ends behind it, and it has others than the sample before")


class _Measured(NamedTuple):
    """What the index has of a sample beside its places."""

    end: int
    crc: int
    length: int
    beside: list[int]
    faults: list[str]
    """Why parts of it are lost, where it is not."""


def _measured(
    content: mmap.mmap,
    sample: TarSample,
    extensions: list[str],
    measure: Measure | None,
    beside: dict[Content, Measure],
) -> _Measured:
    """Reads the sample, and notes where it cannot be had."""
    reach, end = sample.end, min(sample.end, len(content))
    crc = zlib.crc32(memoryview(content)[sample.start : end])
    for piece in sample.pieces_outside():
        reach = max(reach, piece.start + piece.size)
        crc = zlib.crc32(memoryview(content)[piece.start : piece.start + piece.size], crc)
    if reach > len(content):
        sample.lose("is cut off at the end of the file")
    if sample.unreadable or measure is None:
        length = -1 if sample.unreadable else 0
        return _Measured(end, crc, length, [length] * len(beside), [])
    # In the order in which a reader looks for them, which is the same for all samples of the shard.
    held = [extension for extension in extensions if extension in sample.members]
    members = {ext: assembled(content, sample.members[ext].pieces, sample.members[ext].size) for ext in held}
    if not beside:
        length, fault = _length(measure, members)
        if fault:
            sample.lose(fault)
        return _Measured(end, crc, length, [], [])
    found = [_length(one, members) for one in (measure, *beside.values())]
    named = zip(("", *(f"{one}: " for one in beside)), found, strict=True)
    faults = [f"{name}{fault}" for name, (_, fault) in named if fault]
    return _Measured(end, crc, found[0][0], [length for length, _ in found[1:]], faults)


def _length(measure: Measure, members: dict[str, bytes]) -> tuple[int, str]:
    """The length and an empty text, or -1 and why there is none."""
    try:
        length = measure(members)
        if not 0 <= length <= LONGEST:
            raise ValueError(f"says that its length is {length}, which was not read")
    except Exception as error:  # a decoder raises anything for damaged content
        return -1, str(error) or type(error).__name__
    return length, ""


def assembled(content: mmap.mmap, pieces: list[Piece], size: int) -> bytes:
    """A member's bytes."""
    if len(pieces) == 1 and pieces[0].size == size:
        return content[pieces[0].start : pieces[0].start + size]
    whole = bytearray(size)
    for piece in pieces:
        whole[piece.position : piece.position + piece.size] = content[piece.start : piece.start + piece.size]
    return bytes(whole)


def _to_members(samples: list[TarSample], rows: list[_Measured], extensions: list[str], beside: int) -> Members:
    columns = {extension: column for column, extension in enumerate(extensions)}
    table_ne2 = np.full((len(samples), len(extensions), 2), (0, -1), dtype=np.int64)
    pieces: list[tuple[int, int, int, int, int]] = []
    for number, sample in enumerate(samples):
        for extension, member in sample.members.items():
            column = columns[extension]
            if sample.unreadable:  # it has the member; nobody reads it
                table_ne2[number, column] = 0, min(member.size, LONGEST)
            elif sample.holds(member):
                table_ne2[number, column] = member.pieces[0].start - sample.start if member.pieces else 0, member.size
            else:
                table_ne2[number, column] = -1, member.size
                pieces += [(number, column, p.start - sample.start, p.size, p.position) for p in member.pieces]
    start_n = np.array([sample.start for sample in samples], dtype=np.int64)
    return Members(
        keys_n=np.array(
            [sample.key.encode("utf-8", "surrogateescape") for sample in samples] or [b""][:0], dtype=np.bytes_
        ),
        start_n=start_n,
        size_n=np.array([row.end for row in rows], dtype=np.int64) - start_n,
        crc_n=np.array([row.crc for row in rows], dtype=np.uint32),
        length_n=np.array([row.length for row in rows], dtype=np.int64),
        extensions=extensions,
        offset_ne=table_ne2[:, :, 0],
        member_size_ne=table_ne2[:, :, 1],
        pieces_p5=np.array(pieces, dtype=np.int64).reshape(-1, 5),
        beside_nc=np.array([row.beside for row in rows], dtype=np.int64).reshape(len(rows), beside),
    )


def index_shard(
    tar: Path,
    members: Path,
    relative_to: Path,
    measure: Measure | None = None,
    beside: dict[Content, Measure] | None = None,
) -> ShardEntry:
    """Index one local tar: write its `members` file and return its entry."""
    found = index_tar(tar, measure, beside)
    found.members.save(members)
    length_n, beside_nc = found.members.length_n, found.members.beside_nc
    return ShardEntry(
        path=relative_path(tar, relative_to),
        members=relative_path(members, relative_to),
        samples=len(found.members),
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        length=int(length_n[length_n > 0].sum()),
        damage=found.damage,
        lost=int((length_n < 0).sum()),
        passed_over=found.passed_over,
        length_beside=beside_nc.clip(min=0).sum(0).tolist(),
        lost_beside=(beside_nc < 0).sum(0).tolist(),
    )


def relative_path(path: str | Path, folder: str | Path) -> str:
    """`path` as seen from `folder`, so that joining the two leads there also where folders are symbolic links. A link
    as the last part of `path` stays one."""
    return os.path.relpath(real_place(path), os.path.realpath(folder))


def real_place(path: str | Path) -> str:
    """The same for all ways to write a path: its folder without symbolic links, and its own name."""
    path = os.path.realpath(path) if os.path.basename(path) in ("", ".", "..") else path
    return os.path.join(_real_folder(os.path.join(os.getcwd(), os.path.dirname(path))), os.path.basename(path))


@lru_cache(maxsize=256)
def _real_folder(path: str) -> str:
    """Of a set of many shards the same is asked for each."""
    return os.path.realpath(path)
