"""Files and lines that appear whole or not at all, and checksums of files."""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2v_scale.programs.machine import this_system


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a small file durably: readers see the old content or the new one, never a part, whatever happens.

    Raises OSError, and leaves nothing behind then.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """`with atomic_file(path) as temporary:` renames `temporary` to `path` if the block succeeds, else removes it.
    The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process takes, not one of another node or container with the same number."""
    system = hashlib.sha256(this_system().encode()).hexdigest()[:8]
    return path.with_name(f".{path.name}.{socket.gethostname()}-{system}.{os.getpid()}.tmp")


def open_as_usual(path: Path) -> None:
    """Give a file or folder that a library made for its owner only the mode that the umask gives to new ones."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    # Asking the operating system sets it, for other threads, too.
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file (as `sha256sum` prints)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """One JSON object as a line of its own, also behind a line that a kill or a full disk tore."""
    with path.open("ab+") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
