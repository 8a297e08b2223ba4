"""Shards that are not local: brought whole into a cache directory that the processes of a node share.

A `pipe:` command is run by the shell; a URL is opened by fsspec in a process of its own. Both are read as a stream that
may not fall silent, so nothing here can hang.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from d2v_scale.data.config import DataConfig
from d2v_scale.files import temporary_name
from d2v_scale.redaction import redact, same_address

_CHUNK = 1 << 20
_URL = "D2V_SCALE_URL"
_FIRST_PAUSE_S = 60.0
_POLL_S = 0.1


class FetchError(OSError):
    """A shard that could not be fetched."""


class ShardCache:
    """Local copies of shards. Safe between processes; the copies used longest ago are removed beyond `limit_bytes`."""

    def __init__(
        self, directory: str | None, limit_bytes: float, timeout_s: float, retries: int, total_s: float = math.inf
    ) -> None:
        """`timeout_s`: silence after which an attempt is given up; `total_s`: what all attempts may take together, and
        how long one process waits for another that is fetching the shard."""
        self._directory = Path(directory) if directory else default_cache_dir()
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._retries = retries
        self._total_s = total_s
        self._created = time.time()

    @classmethod
    def of(cls, data: DataConfig) -> "ShardCache":
        """As the recipe says. Several shards of a step may hang before the step itself is late."""
        return cls(data.cache_dir, data.cache_gib * 2**30, data.read_timeout_s, data.read_retries, data.timeout_s / 3)

    def path_of(self, url: str, sha256: str = "") -> Path:
        """Where the copy of `url` with this content lies, whatever key the URL is signed with."""
        # Without a checksum two addresses of one place may stand for two contents.
        url = same_address(url) if sha256 else url
        return self._directory / f"{hashlib.sha256((sha256 + url).encode()).hexdigest()[:32]}.tar"

    def fetch(self, url: str, size: int | None = None, sha256: str = "", newer_than: float = 0.0) -> str:
        """The local copy of `url`, fetched if need be. Raises FetchError.

        `size`, `sha256`: of the shard, where known; other contents at the same URL have copies of their own.
        `newer_than`: a copy fetched before (Unix seconds) is fetched again.
        After a failure all processes leave the shard alone for a minute, then two, then four: its samples are lost
        meanwhile.
        """
        path = self.path_of(url, sha256)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + self._total_s
        with path.with_suffix(".lock").open("w") as lock:
            self._acquire(lock.fileno(), deadline)
            if _is_current(path, size or 0, newer_than):
                return str(path)
            failure = self._last_failure(path)
            if failure is not None and time.time() < failure.at + failure.pause_s:
                raise FetchError(failure.reason)
            reason = self._attempts(url, path, size, deadline)
            if reason is not None:
                pause_s = _FIRST_PAUSE_S if failure is None else 2 * failure.pause_s
                with suppress(OSError):  # a full disk must not hide the reason
                    _failure_file(path).write_text(json.dumps(asdict(_Failure(time.time(), pause_s, reason))))
                raise FetchError(reason)
            _failure_file(path).unlink(missing_ok=True)
        make_room(self._directory, "*.tar", self._limit_bytes, path)
        return str(path)

    def remove(self, url: str) -> None:
        """Forget the copy of `url`."""
        self.path_of(url).unlink(missing_ok=True)

    def _acquire(self, lock: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FetchError(f"was not fetched by another process within {self._total_s:.0f} s") from None
                time.sleep(_POLL_S)

    def _last_failure(self, path: Path) -> "_Failure | None":
        """What a process of this run noted; what earlier runs did may have been remedied since."""
        try:
            failure = _Failure(**json.loads(_failure_file(path).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return failure if failure.at >= self._created else None

    def _attempts(self, url: str, path: Path, size: int | None, deadline: float) -> str | None:
        """Why the shard could not be fetched; None: it is there."""
        tried = 0
        while True:
            tried += 1
            try:
                self._download(url, path, size, deadline)
                return None
            except FetchError as error:
                if tried > self._retries or time.monotonic() > deadline:
                    return redact(f"{error} (tried {tried} times)")

    def _download(self, url: str, path: Path, size: int | None, deadline: float) -> None:
        for left_behind in self._directory.glob(f".{path.name}.*.tmp"):
            # Of a process that was killed: whoever fetches this shard holds its lock.
            left_behind.unlink(missing_ok=True)
        temporary = temporary_name(path)
        try:
            self._stream_into(temporary, url, path, size, deadline)
            got = temporary.stat().st_size
            if size is not None and got < size:
                raise FetchError(f"ended after {got} of {size} bytes")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _stream_into(self, temporary: Path, url: str, path: Path, size: int | None, deadline: float) -> None:
        """Where the disk is full, copies used long ago go (half of them if `size` is not known), for a second try."""
        for room_was_made in (False, True):
            try:
                with temporary.open("wb") as out:
                    stream_to(url, out.fileno(), self._timeout_s, deadline)
                return
            except FetchError:
                raise
            except OSError as error:
                used = sum(copy.size for copy in _copies(self._directory, "*.tar"))
                if room_was_made or error.errno != errno.ENOSPC or not used:
                    raise FetchError(
                        f"could not be fetched into {self._directory}: {error.strerror or error}"
                    ) from error
                make_room(self._directory, "*.tar", used - (size or used / 2), path)


@dataclass
class _Failure:
    """A note beside the lock, for all processes of the node."""

    at: float
    """Unix seconds."""
    pause_s: float
    reason: str


def _failure_file(path: Path) -> Path:
    return path.with_suffix(".failed")


def _is_current(path: Path, size: int, newer_than: float) -> bool:
    """Whether the copy can be used; notes that it is (its access time; when it was fetched stays)."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    if stat.st_size < size or stat.st_mtime < newer_than:
        return False
    os.utime(path, (time.time(), stat.st_mtime))
    return True


def default_cache_dir() -> Path:
    """Below the system's temporary directory, one per user."""
    return Path(tempfile.gettempdir()) / f"d2v_scale-shards-{os.getuid()}"


def make_room(directory: Path, pattern: str, limit_bytes: float, newest: Path) -> None:
    """Remove the files used longest ago until the rest fits; `newest` stays."""
    copies = _copies(directory, pattern)
    used = sum(copy.size for copy in copies)
    for copy in sorted(copies):
        if used <= limit_bytes:
            return
        if copy.path != newest:
            copy.path.unlink(missing_ok=True)
            used -= copy.size


class _Copy(NamedTuple):
    used_at: float
    """Unix seconds."""
    size: int
    path: Path


def _copies(directory: Path, pattern: str) -> list[_Copy]:
    copies = []
    for path in directory.glob(pattern):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        copies.append(_Copy(stat.st_atime, stat.st_size, path))
    return copies


def stream_to(url: str, out: int, timeout_s: float, deadline: float) -> None:
    """Copy a `pipe:` command's output or a URL's content to the descriptor `out`. `$NAME` is looked up in both.

    Raises FetchError, also after `timeout_s` of silence and, however much still comes, at `deadline`
    (`time.monotonic`).
    """
    shell = url.startswith("pipe:")
    command: str | list[str] = url[len("pipe:") :] if shell else [sys.executable, "-m", "d2v_scale.shards.fetching"]
    process = subprocess.Popen(
        command,
        shell=shell,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Not as an argument, which every user of the node can read: a URL may be signed.
        env=os.environ if shell else {**os.environ, _URL: os.path.expandvars(url)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors = b""
    # Not `select.select`: it knows descriptors below 1024 only, and a rank of a large world has more.
    open_ends = selectors.DefaultSelector()
    try:
        for pipe in (process.stdout, process.stderr):
            open_ends.register(pipe, selectors.EVENT_READ)
        while open_ends.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise FetchError("was not complete in time")
            ready = open_ends.select(min(timeout_s, left))
            if not ready and left > timeout_s:
                raise FetchError(f"was silent for {timeout_s:.0f} s")
            for end, _ in ready:
                chunk = os.read(end.fd, _CHUNK)
                if not chunk:
                    open_ends.unregister(end.fileobj)
                elif end.fileobj is process.stderr:
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
        open_ends.close()
        process.stdout.close()
        process.stderr.close()


def _write(out: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(out, view) :]


def main() -> None:
    """Copy the URL that the environment names to standard output."""
    import fsspec

    with fsspec.open(os.environ[_URL], "rb") as stream:
        shutil.copyfileobj(stream, sys.stdout.buffer, _CHUNK)


if __name__ == "__main__":
    main()
