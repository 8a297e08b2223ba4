"""The files below a folder that a converter takes, and what it leaves out."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from d2v_scale.errors import DataError

_NAMED = 5
_NO_CONTENT = ("__MACOSX",)
"""Folders that archivers make for a system's own files."""


@dataclass
class FoundFiles:
    """Files below a folder, in the order of their names."""

    source: Path
    files: list[Path]
    hidden: list[Path] = field(default_factory=list)
    """Hidden files, and those in hidden folders."""
    other: dict[str, int] = field(default_factory=dict)
    """How many files there are of each extension that is not taken."""

    def relative(self, path: Path) -> str:
        """A file's path below the folder."""
        return path.name if path == self.source else path.relative_to(self.source).as_posix()

    def left_out(self) -> str:
        """What was left out, in one line; empty: nothing."""
        parts = []
        if self.hidden:
            named = ", ".join(str(path) for path in self.hidden[:_NAMED])
            parts.append(f"{len(self.hidden)} hidden ({named}{', ...' if len(self.hidden) > _NAMED else ''})")
        for extension, count in sorted(self.other.items(), key=lambda other: -other[1])[:_NAMED]:
            parts.append(f"{count} {extension or 'without an extension'}")
        return f"left out: {', '.join(parts)}" if parts else ""


def last_extension(path: Path) -> str:
    """`jpg` of `a.JPG`."""
    return path.suffix[1:].lower()


def find_files(
    source: Path,
    extensions: Iterable[str],
    match: str | None = None,
    extension_of: Callable[[Path], str] = last_extension,
) -> FoundFiles:
    """Files below `source`, which may be a file. Links to folders are followed; hidden files are not taken.

    Raises DataError where there are none, for a link that leads back to a folder it lies in, and for a folder that
    cannot be read.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist.")
    try:
        wanted_path = re.compile(match or "")
    except re.error as error:
        raise DataError(f"--match {match!r} is no pattern: {error}.") from None
    wanted = set(extensions)
    found = FoundFiles(source, [])
    others: Counter[str] = Counter()
    for path, hidden in [(source, False)] if source.is_file() else walk(source, False, ()):
        if not wanted_path.search(found.relative(path)):
            continue
        if hidden:
            found.hidden.append(path)
        elif extension_of(path) in wanted:
            found.files.append(path)
        else:
            others[path.suffix.lower()] += 1
    found.files.sort()
    found.other = dict(others)
    if not found.files:
        raise DataError(
            f"No file below {source} ends in .{', .'.join(sorted(wanted))} ({found.left_out() or 'it is empty'}).",
            "Check SRC and --match.",
        )
    return found


def walk(folder: Path, hidden: bool, above: tuple[tuple[int, int], ...]) -> Iterable[tuple[Path, bool]]:
    """Files, and whether they are hidden. `above`: the folders that this one lies in, however it was reached. Raises
    DataError for a folder that cannot be read, and for a link that leads back to one it lies in."""
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise DataError(f"{folder} leads back to a folder that it lies in.", "Remove the link.")
    for entry in entries:
        path = folder / entry.name
        is_hidden = hidden or entry.name.startswith(".") or entry.name in _NO_CONTENT
        if path.is_dir():
            yield from walk(path, is_hidden, (*above, identity))
        elif path.is_file() or not path.exists():  # a link to nothing is named when it is read
            yield path, is_hidden
