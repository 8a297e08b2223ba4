"""Documents are tokenised once per machine: a file per shard that the workers of all ranks fill and read together.

The index knows how many tokens every document has, so each has its place in the file beforehand, and no locks are
needed: two processes that tokenise the same document write the same bytes.
"""

import hashlib
import mmap
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2v_scale.shards.fetching import default_cache_dir, make_room

Tokens = NDArray[np.int64]


class CachedTokens:
    """The tokens of one shard's documents, as far as they are known."""

    def __init__(self, path: Path, length_n: Tokens) -> None:
        """Raises OSError where the file cannot be made."""
        self.end_n = np.cumsum(length_n)
        self._length_n = length_n
        # A flag per document, then the tokens as int32.
        self._tokens_at = -(-len(length_n) // 4) * 4
        size = self._tokens_at + 4 * int(self.end_n[-1]) if len(length_n) else 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.truncate(self._descriptor, size)
        content = mmap.mmap(self._descriptor, size, prot=mmap.PROT_READ) if size else b""
        self._known_n = np.frombuffer(content, dtype=np.uint8, count=len(length_n))
        self._tokens = np.frombuffer(content, dtype="<i4", offset=self._tokens_at)

    def unknown(self, first: int, last: int) -> list[int]:
        """Documents from `first` to `last` that nobody has tokenised yet."""
        return (first + np.flatnonzero(self._known_n[first : last + 1] == 0)).tolist()

    def put(self, number: int, tokens: Tokens) -> None:
        """Keep a document's tokens, all of them or none. Raises OSError, such as for a full disk."""
        start = int(self.end_n[number] - self._length_n[number])
        # Written with a system call: storing through the map would end the process on a full disk.
        content = memoryview(tokens.astype("<i4").tobytes())
        at = self._tokens_at + 4 * start
        while content:
            # A nearly full disk takes a part; the next call says that it is full.
            written = os.pwrite(self._descriptor, content, at)
            content, at = content[written:], at + written
        os.pwrite(self._descriptor, b"\1", number)

    def get(self, start: int, stop: int) -> Tokens:
        """Tokens of the shard's stream of documents."""
        return self._tokens[start:stop].astype(np.int64)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class TokenCache:
    """The shards' token files. Those used longest ago are removed beyond `limit_bytes`."""

    def __init__(self, directory: str | None, limit_bytes: float, tokenizer_sha256: str, keep: int = 64) -> None:
        """`keep`: how many shards stay open."""
        self._directory = Path(directory) if directory else default_cache_dir()
        self._limit_bytes = limit_bytes
        self._keep = keep
        self._tokenizer_sha256 = tokenizer_sha256
        self._open: OrderedDict[str, CachedTokens] = OrderedDict()

    def shard(self, sha256: str, length_n: Tokens) -> CachedTokens:
        """The file of the shard with this checksum. Raises OSError."""
        if sha256 in self._open:
            self._open.move_to_end(sha256)
            return self._open[sha256]
        name = hashlib.sha256((self._tokenizer_sha256 + sha256).encode()).hexdigest()[:32]
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._directory / f"{name}.tokens"
        cached = CachedTokens(path, length_n.clip(min=0))
        os.utime(path)
        make_room(self._directory, "*.tokens", self._limit_bytes, path)
        self._open[sha256] = cached
        if len(self._open) > self._keep:
            self._open.popitem(last=False)[1].close()
        return cached
