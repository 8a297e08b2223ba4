"""Samples to shards: a tar and its index per shard, each complete or absent, whole runs resumable."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from d2v_scale.files import atomic_file, file_sha256
from d2v_scale.shards.content import Content
from d2v_scale.shards.shard_index import Measure, Members, SetIndex, ShardEntry, index_shard
from d2v_scale.shards.shard_set import INDEX_SUFFIX

Sample = dict[str, Any]
"""`__key__`, and a value per extension that webdataset encodes (bytes as they are, `cls` an int, `txt` a string)."""


def shard_name(prefix: str, number: int) -> str:
    """File name of a shard."""
    return f"{prefix}-{number:06d}.tar"


def write_shard(
    path: Path,
    samples: Iterable[Sample],
    measure: Measure | None = None,
    beside: dict[Content, Measure] | None = None,
) -> ShardEntry:
    """Write one tar and its binary index. The tar's bytes depend on the samples only. `beside`: measures the further
    contents of the samples."""
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        writer = TarWriter(stream, mtime=0, user="", group="")
        for sample in samples:
            writer.write(sample)
        writer.close()
    return index_shard(path, members_file(path), path.parent, measure, beside)


def members_file(tar: Path) -> Path:
    """Where the binary index of a shard lies."""
    return tar.with_suffix(".index")


def write_set(
    out: Path,
    prefix: str,
    content: Content,
    samples: list[Sample],
    *,
    per_shard: int,
    measure: Measure | None = None,
    beside: dict[Content, Measure] | None = None,
    classes: list[str] | None = None,
    tokenizer: Path | None = None,
) -> SetIndex:
    """Write a small set of shards `prefix-*.tar` and its index in one go. `beside`: measures the further contents."""
    entries = []
    for number, start in enumerate(range(0, len(samples), per_shard)):
        part = samples[start : start + per_shard]
        entries.append(write_shard(out / shard_name(prefix, number), part, measure, beside))
    index = SetIndex(content=content, beside=list(beside or {}), shards=entries, classes=classes or [])
    if tokenizer is not None:
        index.tokenizer, index.tokenizer_sha256 = tokenizer.name, file_sha256(tokenizer)
    index.save(out / f"{prefix}{INDEX_SUFFIX}")
    return index


def is_written(path: Path) -> bool:
    """True when the shard and its index are complete."""
    if not path.is_file() or not members_file(path).is_file():
        return False
    members = Members.load(members_file(path))
    return len(members) == 0 or int((members.start_n + members.size_n).max()) <= path.stat().st_size
