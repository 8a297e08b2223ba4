"""Shards that are not local: brought whole into a cache directory that the processes of a node share.

A `pipe:` command is run by the shell; a URL is opened by fsspec in a process of its own. Both are read as a stream that
may not fall silent, so nothing here can hang.
"""

import fcntl
import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CHUNK = 1 << 20
_FIRST_PAUSE_S = 60.0


class FetchError(OSError):
    """A shard that could not be fetched."""


class ShardCache:
    """Local copies of shards. Safe between processes; the copies used longest ago are removed beyond `limit_bytes`."""

    def __init__(self, directory: str | None, limit_bytes: float, timeout_s: float, retries: int) -> None:
        self._directory = Path(directory) if directory else default_cache_dir()
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._retries = retries
        self._failed: dict[str, tuple[float, float, str]] = {}

    def path_of(self, url: str) -> Path:
        """Where the copy of `url` lies."""
        return self._directory / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"

    def fetch(self, url: str, size: int | None = None) -> str:
        """The local copy of `url`, fetched if need be. `size`: its bytes, where known. Raises FetchError.

        After a failure the shard is left alone for a minute, then two, then four: its samples are lost meanwhile.
        """
        until, _, reason = self._failed.get(url, (0.0, 0.0, ""))
        if time.monotonic() < until:
            raise FetchError(reason)
        path = self.path_of(url)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file():
                os.utime(path)
                return str(path)
            for attempt in range(self._retries + 1):
                try:
                    self._download(url, path, size)
                    break
                except FetchError as error:
                    reason = f"{error} (tried {attempt + 1} times)"
            else:
                pause = 2 * self._failed.get(url, (0, _FIRST_PAUSE_S / 2, ""))[1]
                self._failed[url] = (time.monotonic() + pause, pause, reason)
                raise FetchError(reason)
        self._failed.pop(url, None)
        make_room(self._directory, "*.tar", self._limit_bytes, path)
        return str(path)

    def remove(self, url: str) -> None:
        """Forget the copy of `url`."""
        self.path_of(url).unlink(missing_ok=True)

    def _download(self, url: str, path: Path, size: int | None) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as out:
                stream_to(url, out.fileno(), self._timeout_s)
            got = temporary.stat().st_size
            if size is not None and got < size:
                raise FetchError(f"ended after {got} of {size} bytes")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def default_cache_dir() -> Path:
    """Below the system's temporary directory, one per user."""
    return Path(tempfile.gettempdir()) / f"d2v_scale-shards-{os.getuid()}"


def make_room(directory: Path, pattern: str, limit_bytes: float, newest: Path) -> None:
    """Remove the files used longest ago until the rest fits; `newest` stays."""
    copies = []
    for path in directory.glob(pattern):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        copies.append((stat.st_mtime, stat.st_size, path))
    used = sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if used <= limit_bytes:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            used -= size


def stream_to(url: str, out: int, timeout_s: float) -> None:
    """Copy a `pipe:` command's output or a URL's content to the descriptor `out`. Raises FetchError."""
    shell = url.startswith("pipe:")
    command: str | list[str] = url[len("pipe:") :] if shell else [sys.executable, "-m", "d2v_scale.data.fetching", url]
    process = subprocess.Popen(
        command,
        shell=shell,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors = b""
    try:
        open_ends = [process.stdout, process.stderr]
        while open_ends:
            ready, _, _ = select.select(open_ends, [], [], timeout_s)
            if not ready:
                raise FetchError(f"was silent for {timeout_s:.0f} s")
            for end in ready:
                chunk = os.read(end.fileno(), _CHUNK)
                if not chunk:
                    open_ends.remove(end)
                elif end is process.stderr:
                    errors = (errors + chunk)[-2000:]
                else:
                    _write(out, chunk)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise FetchError(f"did not end within {timeout_s:.0f} s of its output") from None
        if status != 0:
            lines = errors.decode(errors="replace").strip().splitlines()
            raise FetchError(f"ended with status {status}: {lines[-1] if lines else 'no message'}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        process.stderr.close()


def _write(out: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(out, view) :]


def main() -> None:
    """Copy the URL that is the first argument to standard output."""
    import fsspec

    with fsspec.open(sys.argv[1], "rb") as stream:
        shutil.copyfileobj(stream, sys.stdout.buffer, _CHUNK)


if __name__ == "__main__":
    main()
