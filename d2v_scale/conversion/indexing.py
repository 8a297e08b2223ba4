"""Indexes of existing WebDataset tars: `d2v index`."""

import argparse
import hashlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from d2v_scale.conversion.array_layouts import layout_of
from d2v_scale.conversion.measures import measures_of
from d2v_scale.conversion.recognising import describe, recognised
from d2v_scale.data.labels import class_number
from d2v_scale.errors import DataError
from d2v_scale.modalities.text.tokenizer import tokenizer_sha256, usable_tokenizer
from d2v_scale.redaction import same_address
from d2v_scale.shards.content import WORDS, Content, length_of, plural, word_of
from d2v_scale.shards.fetching import ShardCache
from d2v_scale.shards.patterns import expand, is_remote
from d2v_scale.shards.shard_index import FORMAT, Measure, SetIndex, ShardEntry, index_shard, real_place, relative_path
from d2v_scale.shards.shard_jobs import Part, run_all
from d2v_scale.shards.shard_set import INDEX_SUFFIX

_TIMEOUT_S = 300.0
_RETRIES = 2
_UNKNOWN = "unknown"
_NO_VERSION = {"name", "size", "type", "mimetype", "url", "partial"}
"""What a web server without ETag tells: a shard written anew may have the same."""


@dataclass
class Job:
    """One tar to be indexed, by any process."""

    path: str
    members: Path
    content: Content
    tokenizer: Path | None
    tokenizer_sha256: str | None
    cache: Path
    max_pixels: int
    key: str | None = None
    """Of the array in a `.npz`."""
    beside: tuple[Content, ...] = ()
    """What the samples hold beside `content`."""

    @property
    def record(self) -> Path:
        return self.members.parent / ".index_shards" / f"{self.members.stem}.json"

    def digest(self) -> str:
        return self.digest_of(_version(self.path))

    def digest_of(self, version: object) -> str:
        # The word of earlier versions: what they indexed is not read again.
        made = (FORMAT, self.path, version, word_of(self.content), self.tokenizer_sha256, self.max_pixels)
        inputs: tuple[object, ...] = made if self.key is None else (*made, self.key)
        inputs = (*inputs, *self.beside) if self.beside else inputs
        return hashlib.sha256(repr(inputs).encode()).hexdigest()

    def is_done(self) -> bool:
        return self.members.is_file()

    def run(self) -> Part:
        """Index the tar; what is not local is fetched for that long."""
        cache = ShardCache(str(self.cache), float("inf"), _TIMEOUT_S, _RETRIES)
        try:
            tar = Path(cache.fetch(self.path, newer_than=time.time()) if is_remote(self.path) else self.path)
            return self._index(tar)
        except OSError as error:
            raise DataError(
                f"The shard {self.path} cannot be read: {error}.", "Restore it, or leave it out."
            ) from error
        finally:
            if is_remote(self.path):
                cache.remove(self.path)

    def _index(self, tar: Path) -> Part:
        part = Part("", {})
        measures = measures_of((self.content, *self.beside), self.tokenizer, self.max_pixels, self.key)
        layouts: Counter[str] = Counter()

        def noting(content: Content, measure: Measure) -> Measure:
            def noted(members: dict[str, bytes]) -> int:
                length = measure(members)
                if content == "array":
                    layouts[str(layout_of(members, self.key))] += 1
                if "cls" in members:  # of what is lost nobody reads the label
                    _note_label(part, members["cls"], counted=content == self.content)
                return length

            return noted

        first, *others = [(content, noting(content, measure)) for content, measure in measures.items()]
        entry = index_shard(tar, self.members, self.members.parent, first[1], dict(others))
        if is_remote(self.path):
            entry.path = self.path
        part.entry, part.layouts = asdict(entry), dict(layouts)
        return part


def _note_label(part: Part, label: bytes, counted: bool) -> None:
    """`counted`: an odd one counts; of samples with several contents once."""
    try:
        part.classes = max(part.classes, class_number(label) + 1)
    except ValueError as error:
        part.odd_labels += counted
        part.odd_label = part.odd_label or str(error)


def _version(path: str) -> object:
    """What changes when a shard does: size and time of a local one, what a URL's server tells, else `_UNKNOWN`."""
    if not is_remote(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    if path.startswith("pipe:"):
        return _UNKNOWN
    from fsspec.core import url_to_fs

    try:
        system, name = url_to_fs(path)
        info = system.info(name)
    except Exception:  # of any kind of server; whether the shard can be read is found out when it is fetched
        return _UNKNOWN
    told = {key: info[key] for key in sorted(info) if info[key] is not None}
    return repr(told) if told.keys() - _NO_VERSION else _UNKNOWN


def make_index(arguments: argparse.Namespace) -> tuple[SetIndex, Path]:
    """Index all shards and write the set's index; returns it and its path. Raises DataError."""
    paths = _paths(arguments.shards)
    out = arguments.out or (None if is_remote(paths[0]) else Path(paths[0]).parent)
    if out is None:
        raise DataError("The shards are not local.", "Say with --out where their index goes.")
    out.mkdir(parents=True, exist_ok=True)
    name = arguments.name or _common_name(paths)
    contents = (
        recognised(paths[0], arguments.tokenizer is not None)
        if arguments.modality is None
        else _contents(arguments.modality)
    )
    if arguments.modality is None:
        print(describe(contents), file=sys.stderr)
    if arguments.tokenizer is not None:
        if all(length_of(content).unit != "tokens" for content in contents):
            held = " with ".join(map(plural, contents))
            raise DataError(f"--tokenizer is given, but the shards hold {held}, which have no tokens.", "Leave it out.")
        arguments.tokenizer = usable_tokenizer(arguments.tokenizer)
    cache = out / ".fetched"
    target = out / f"{name}{INDEX_SUFFIX}"
    _refuse_overwriting(list(_jobs(paths, out, name, contents, arguments, cache)), target)
    parts = run_all(_jobs(paths, out, name, contents, arguments, cache), arguments.processes)
    if cache.is_dir():
        for path in cache.iterdir():
            path.unlink()
        cache.rmdir()
    _tell_odd_labels(parts)
    _tell_odd_layouts(parts)
    classes = (
        arguments.classes.split(",") if arguments.classes else [str(k) for k in range(max(p.classes for p in parts))]
    )
    entries = [ShardEntry(**part.entry) for part in parts]
    index = SetIndex(content=contents[0], beside=contents[1:], shards=entries, classes=classes)
    if arguments.tokenizer is not None:
        index.tokenizer, index.tokenizer_sha256 = (
            relative_path(arguments.tokenizer, out),
            tokenizer_sha256(arguments.tokenizer),
        )
    _require_samples(index, arguments.shards)
    index.save(target)
    for job, part in zip(_jobs(paths, out, name, contents, arguments, cache), parts, strict=True):
        if part.digest == job.digest_of(_UNKNOWN):
            # It served to continue an interrupted run. The next one cannot tell whether the shard is still the same.
            job.record.unlink(missing_ok=True)
    return index, target


def _contents(words: str) -> list[Content]:
    """`vision,speech`: what the samples hold. Raises DataError."""
    named = words.split(",")
    unknown = [word for word in named if word not in WORDS]
    if unknown or len(set(named)) < len(named):
        shown = f"{unknown[0]!r} is no modality" if unknown else f"--modality {words} names one twice"
        raise DataError(f"{shown}.", f"Give one or several of {', '.join(WORDS)}, separated by commas.")
    return [WORDS[word] for word in named]


def _tell_odd_labels(parts: list[Part]) -> None:
    odd = sum(part.odd_labels for part in parts)
    if odd:
        first = next(part.odd_label for part in parts if part.odd_labels)
        print(
            f"{odd} labels are of no use to probes and fine-tuning; pretraining needs none. The first: {first}",
            file=sys.stderr,
        )


def _tell_odd_layouts(parts: list[Part]) -> None:
    """A set has one number of channels and axes: what is otherwise is lost to the model that reads the rest."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part.layouts)
    [(usual, most), *others] = total.most_common() or [("", 0)]
    for layout, count in others:
        first = next(part.entry["path"] for part in parts if layout in part.layouts)
        said = f"{count} samples have {layout}, the first in {first}"
        print(f"{said}: a model of the {most} that have {usual} loses them", file=sys.stderr)


def _paths(pattern: str) -> list[str]:
    """The shards, whatever index they may have already."""
    if pattern.endswith(INDEX_SUFFIX):
        raise DataError(f"{pattern} is an index already.", "Give the tars.")
    return expand(pattern)


def _jobs(
    paths: list[str], out: Path, name: str, contents: list[Content], arguments: argparse.Namespace, cache: Path
) -> Iterator[Job]:
    model = arguments.tokenizer
    checksum = None if model is None else tokenizer_sha256(model)
    for path, stem in zip(paths, _stems(paths, name), strict=True):
        target = out / f"{stem}.index"
        pixels, key, beside = arguments.max_pixels, arguments.key, tuple(contents[1:])
        yield Job(path, target, contents[0], model, checksum, cache, pixels, key, beside)


def _stems(paths: list[str], name: str) -> list[str]:
    """What the index of each shard is called: as the shard, with its folders where several are called the same.

    Raises DataError, which names two, where that does not tell them apart.
    """
    stems = [f"{name}-{number:06d}" if is_remote(path) else Path(path).stem for number, path in enumerate(paths)]
    counts = Counter(stems)
    if max(counts.values()) > 1:
        common = os.path.commonpath([os.path.dirname(real_place(path)) for path in paths if not is_remote(path)])
        for number, path in enumerate(paths):
            if counts[stems[number]] > 1 and not is_remote(path):
                stems[number] = os.path.relpath(real_place(path), common).replace("/", "-").removesuffix(".tar")
    first: dict[str, str] = {}
    for path, stem in zip(paths, stems, strict=True):
        if first.setdefault(stem, path) != path:
            raise DataError(
                f"The indexes of {first[stem]} and {path} would both be called {stem}.index.",
                "Index them one after the other, each with its own --out.",
            )
    return stems


def _refuse_overwriting(jobs: list[Job], target: Path) -> None:
    """Raises DataError, which says what and by what, where the index of other shards would be overwritten."""
    mine = {real_place(job.members): job for job in jobs}
    for known in sorted(target.parent.glob(f"*{INDEX_SUFFIX}")):
        try:
            index = SetIndex.load(known)
        except DataError:
            continue
        for entry in index.shards:
            job = mine.get(real_place(known.parent / entry.members))
            if job is None:
                continue
            listed = entry.path if is_remote(entry.path) else real_place(known.parent / entry.path)
            other_shard = _place(listed) != _place(job.path) and (is_remote(listed) or os.path.exists(listed))
            held = [job.content, *job.beside]
            made_otherwise = (index.contents, index.tokenizer_sha256) != (held, job.tokenizer_sha256)
            if other_shard or (made_otherwise and known != target):
                what = f"of {listed}" if other_shard else f"of another content or tokenizer, in {known.name}"
                raise DataError(
                    f"{job.members} is the index {what}, and would be overwritten by that of {job.path}.",
                    f"Give another --out, index all shards together, or remove {known}.",
                )


def _place(path: str) -> str:
    """Where a shard lies, whatever key its URL is signed with."""
    return same_address(path) if is_remote(path) else real_place(path)


def _require_samples(index: SetIndex, shards: str) -> None:
    """Raises DataError where no sample can be read, or one content of none, and says what was found instead."""
    lost = [sum(entry.lost for entry in index.shards)]
    lost += [sum(entry.lost_beside[column] for entry in index.shards) for column in range(len(index.beside))]
    empty = [content for content, count in zip(index.contents, lost, strict=True) if count >= index.samples]
    if not empty:
        return
    what = f"{empty[0]} of a sample" if index.beside else "sample"
    found = [f"{entry.path}: {line}" for entry in index.shards for line in (*entry.damage, *entry.passed_over)]
    told = f", but: {'; '.join(found[:3])}" if found else ""
    raise DataError(
        f"The shards of {shards!r} hold no {what} that can be read{told}.", "Check --modality and the tars."
    )


def _common_name(paths: list[str]) -> str:
    """`train` of `/a/train-000000.tar`; of a URL or command its last word that is called so."""
    named = [Path(paths[0]).stem]
    if is_remote(paths[0]):
        # What a URL is signed with is no name.
        named = re.findall(r"([^/\s'\"=]+)\.tar\b", re.sub(r"\?[^\s'\"]*", "", paths[0]))
    return re.sub(r"[-_.]?\d+$", "", named[-1] if named else "") or "shards"
