"""What is in a tar: the files that Python's tarfile gives for it, each as the pieces of the tar that its bytes are.

Links inside the tar lead to their files and sparse files have their holes, as `tarfile.extractfile` has them. What no
sample can be made of is counted by kind (`PassedOver`), and damage does not end the reading.
"""

import mmap
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NO_END = "ends without an end-of-archive mark"

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(1 << 20)
_LARGEST_SPARSE = 1 << 30
_LINKS_FOLLOWED = 40
_VOLUME_LABEL, _CONTINUED, _DUMPED_FOLDER = b"V", b"M", b"D"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\3\4": "zip",
}


class Piece(NamedTuple):
    """A part of a member's bytes."""

    start: int
    """Where it lies in the tar, bytes."""
    size: int
    position: int
    """Where it belongs in the member, bytes."""


@dataclass(slots=True)
class TarMember:
    """One file of a tar."""

    name: str
    start: int
    """Where its first header begins, bytes."""
    end: int
    """Where its own bytes in the tar end; those of a link are its headers."""
    size: int
    pieces: list[Piece]
    """Bytes that no piece holds are zero."""
    unreadable: str = ""
    """Why its bytes cannot be had; empty: they can."""
    is_link: bool = False
    """Its pieces are those of another member."""
    kind: str = ""
    """What it is, where it is no file, as `PassedOver` counts it."""


@dataclass
class PassedOver:
    """What a tar holds that is no part of a sample: how many of each kind, and the first."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one more of a kind."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, shown(name))

    def lines(self) -> list[str]:
        """One line a kind."""
        return [f"{kind}: {count}, the first {self.first[kind]}" for kind, count in self.counts.items()]


def shown(name: str) -> str:
    """A name from a tar, to be shown: bytes that are not UTF-8 as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def compression_of(beginning: bytes) -> str | None:
    """How a file that begins like this is compressed, or None."""
    return next((name for magic, name in _COMPRESSED.items() if beginning.startswith(magic)), None)


def tar_members(content: mmap.mmap, damage: list[str], passed_over: PassedOver) -> list[TarMember | None]:
    """All members of a tar in their order; None where something was skipped, so that no sample spans the gap.

    Files, and with a `kind` the folders and devices. Appends to `damage` and `passed_over`.
    """
    found: list[TarMember | None] = []
    links: list[tuple[int, tarfile.TarInfo]] = []
    for info in _headers(content, damage, passed_over):
        if info is None:
            found.append(None)
            continue
        if info.issym() or info.islnk():
            links.append((len(found), info))
        found.append(_member(info))
    if links:
        _follow(links, found)
    return found


def _headers(content: mmap.mmap, damage: list[str], passed_over: PassedOver) -> Iterator[tarfile.TarInfo | None]:
    position, size = 0, len(content)
    while position < size:
        position, ended = yield from _archive(content, position)
        if ended:
            position = _next_content(content, position, size)
            if position >= size:
                return
            yield None
            if not _is_header(content, position):
                passed_over.add("bytes behind the end of the tar that are none", f"at byte {position}")
                return
            passed_over.add("further tars behind the end of the first, which are read", f"at byte {position}")
        elif position < size:
            damage.append(f"damaged tar header at byte {position}")
            yield None
            position = _next_header(content, position + _BLOCK, size)
    damage.append(NO_END)


def _archive(content: mmap.mmap, position: int) -> Any:
    """Yields the members from `position` on; returns where it stopped, and whether that is the archive's end."""
    size = len(content)
    content.seek(position)
    try:
        tar: Any = tarfile.TarFile(fileobj=content, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
        info, tar.firstmember = tar.firstmember, None
        while info is not None and info.size >= 0 and tar.offset > position:
            yield info
            position = tar.offset
            if position >= size:
                break
            tar.members = []
            info = tar.next()
    except (tarfile.TarError, ArithmeticError, LookupError, ValueError, EOFError, RecursionError):
        pass  # whatever a damaged header makes of the library: the next one is looked for
    return position, position < size and content[position : position + _BLOCK] == bytes(_BLOCK)


def _next_content(content: mmap.mmap, position: int, size: int) -> int:
    """The first block from `position` on that is not zero."""
    while position < size:
        chunk = content[position : position + len(_ZEROS)]
        if chunk != _ZEROS[: len(chunk)]:
            return position + (len(chunk) - len(chunk.lstrip(b"\0"))) // _BLOCK * _BLOCK
        position += len(chunk)
    return size


def _next_header(content: mmap.mmap, position: int, size: int) -> int:
    while position < size and not _is_header(content, position):
        position += _BLOCK
    return position


def _is_header(content: mmap.mmap, position: int) -> bool:
    try:
        tarfile.TarInfo.frombuf(content[position : position + _BLOCK], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _member(info: tarfile.TarInfo) -> TarMember:
    if info.type == tarfile.REGTYPE and info.sparse is None:  # type: ignore[attr-defined]
        return _stored(info)
    if info.type == _CONTINUED:
        return TarMember(info.name, info.offset, info.offset_data, 0, [], "continues a file of another tar")
    if info.isdir() or info.type == _DUMPED_FOLDER:
        return TarMember(info.name, info.offset, info.offset_data, 0, [], kind="folders")
    if info.type == _VOLUME_LABEL:
        return TarMember(info.name, info.offset, info.offset_data, 0, [], kind="volume labels")
    if info.isdev():
        return TarMember(info.name, info.offset, info.offset_data, 0, [], kind="devices and pipes")
    if info.islnk() or info.issym():
        return TarMember(info.name, info.offset, info.offset_data, 0, [], is_link=True)
    if info.sparse is not None:  # type: ignore[attr-defined]
        return _sparse(info)
    return _stored(info)


def _stored(info: tarfile.TarInfo) -> TarMember:
    pieces = [Piece(info.offset_data, info.size, 0)] if info.size else []
    return TarMember(info.name, info.offset, info.offset_data + info.size, info.size, pieces)


def _sparse(info: tarfile.TarInfo) -> TarMember:
    """A file that is stored without its holes."""
    pieces, start, reached = [], info.offset_data, 0
    stored: Any = info.sparse  # type: ignore[attr-defined]
    for position, size in stored:
        if size == 0:  # unused places of a header's map
            continue
        if position < reached or size < 0 or position + size > info.size:
            why = "is stored sparse, and its map contradicts itself"
            return TarMember(info.name, info.offset, info.offset_data, 0, [], why)
        pieces.append(Piece(start, size, position))
        start, reached = start + size, position + size
    member = TarMember(info.name, info.offset, start, info.size, pieces)
    if info.size > _LARGEST_SPARSE:
        member.unreadable = f"is stored sparse, and {info.size} bytes long with its holes"
    return member


def _follow(links: list[tuple[int, tarfile.TarInfo]], found: list[TarMember | None]) -> None:
    """Give links the bytes of what they lead to, as tarfile does: hard links to the last file of that name before them,
    symbolic ones to the last in the tar."""
    names: dict[str, list[int]] = {}
    for number, member in enumerate(found):
        if member is not None:
            names.setdefault(posixpath.normpath(member.name), []).append(number)
    targets: dict[int, int | None] = {}
    for number, info in links:
        if info.issym():
            linked = "/".join(filter(None, (os.path.dirname(info.name), info.linkname)))
            targets[number] = names.get(posixpath.normpath(linked), [None])[-1]
        else:
            before = [k for k in names.get(posixpath.normpath(info.linkname), []) if k < number]
            targets[number] = before[-1] if before else None
    for number, info in links:
        member, target = found[number], number
        assert member is not None
        for _ in range(_LINKS_FOLLOWED):
            if target not in targets or (following := targets[target]) is None:
                break
            target = following
        file = found[target]
        if target in targets or file is None or file.kind:
            member.unreadable = f"is a link to {shown(info.linkname)}, which is no file of the tar"
        else:
            member.size, member.pieces, member.unreadable = file.size, file.pieces, file.unreadable
