"""Files that appear whole or not at all, and their checksums."""

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a small file durably: readers see the old content or the new one, never a part, whatever happens.

    Raises OSError, and leaves nothing behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file (as `sha256sum` prints)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
