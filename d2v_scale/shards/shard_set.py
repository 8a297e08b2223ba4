"""From a pattern to the shards it names, their index, and the checks that come before the first step."""

import fnmatch
import glob
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data.config import SourceConfig
from d2v_scale.data2vec.stateless import key
from d2v_scale.errors import DataError
from d2v_scale.shards.class_names import ClassNames
from d2v_scale.shards.content import Content, plural
from d2v_scale.shards.patterns import braces, expand, found_by, is_glob, is_remote, require_one
from d2v_scale.shards.shard_index import FORMAT, Members, SetIndex, ShardEntry, real_place
from d2v_scale.shards.tar_members import shown

INDEX_SUFFIX = ".index.json"
MEMBERS_SUFFIX = ".index"
_REINDEX = "Make the index again with `d2v index`, or restore the shard."
_CHECKED_AT_START = 2000
_LOOKED_INTO = 32


@dataclass
class ShardSet:
    """The shards of one source. Those without an index can only be streamed."""

    paths: list[str]
    """Local paths, URLs or `pipe:` commands."""
    entries: list[ShardEntry] = field(default_factory=list)
    """One per path; empty: there is no index."""
    member_files: list[str] = field(default_factory=list)
    """The binary index of each shard."""
    index: SetIndex | None = None
    """The set's index (of the first, where shards come from several sets)."""
    index_file: Path | None = None
    class_names: list[ClassNames] = field(default_factory=list)
    """Of every set that shards come from: its index file and its classes."""
    column: int | None = None
    """Which of `Members.beside_nc` holds the lengths; None: they are `Members.length_n`."""
    together: tuple[int, ...] | None = None
    """Columns, -1 for `Members.length_n`, of contents that are read together: a sample is lost where all of them are.
    None: one content is read."""
    hidden: frozenset[str] = frozenset()
    """Extensions of members that belong to another content, which the one that is read would take for its own."""

    @property
    def indexed(self) -> bool:
        return self.index is not None

    @cached_property
    def samples_s(self) -> NDArray[np.int64]:
        """Samples in each shard."""
        return np.array([entry.samples for entry in self.entries], dtype=np.int64)

    @cached_property
    def length_s(self) -> NDArray[np.int64]:
        """Length of each shard (16 kHz samples or tokens)."""
        return np.array([entry.length for entry in self.entries], dtype=np.int64)

    def fingerprint(self) -> int:
        """The same for the same contents in the same order, wherever they lie. 62 bits."""
        return key(*(part for entry in self.entries for part in (entry.sha256, entry.samples))) >> 2

    def members(self, shard: int) -> Members:
        """The samples of a shard, read from its binary index, as one sees them who reads some of their contents. Raises
        DataError where the two indexes disagree."""
        members = self.all_members(shard)
        if self.column is not None:
            members.length_n = members.beside_nc[:, self.column]
        if self.together is not None:
            members.length_n = self.lengths_of(members, self.together).max(axis=1, initial=-1)
        if self.hidden:
            members.extensions = ["" if name in self.hidden else name for name in members.extensions]
        return members

    @staticmethod
    def lengths_of(members: Members, columns: tuple[int, ...]) -> NDArray[np.int64]:
        """(N, C): the lengths in these columns, of which -1 is `Members.length_n`."""
        return np.stack([members.length_n if c < 0 else members.beside_nc[:, c] for c in columns], axis=1)

    def all_members(self, shard: int) -> Members:
        """The samples of a shard, as its binary index has them. Raises DataError where the two indexes disagree."""
        members = Members.load(self.member_files[shard])
        if len(members) != self.entries[shard].samples:
            raise DataError(
                f"{self.member_files[shard]} holds {len(members)} samples, {self.index_file} says "
                f"{self.entries[shard].samples}.",
                _REINDEX,
            )
        return members

    def one(self, shard: int) -> "ShardSet":
        """This shard alone, still with its index, wherever that lies. Raises DataError where there is none."""
        if not self.indexed:
            raise DataError(f"The shard {self.paths[shard]} has no index.", "Make one with `d2v index`.")
        part = slice(shard, shard + 1)
        return replace(self, paths=self.paths[part], entries=self.entries[part], member_files=self.member_files[part])

    def require_tokenizer(self, pattern: str, tokenizer: Path | None) -> None:
        """Raises DataError where `tokenizer` is None and the shards, called `pattern`, hold text and no ids."""
        if tokenizer is None and "npy" not in self.members(0).extensions:
            raise DataError(
                f"The shards of {pattern!r} hold text, but neither the recipe nor their index names a tokenizer.",
                "Set data.text.tokenizer, and index the shards with `d2v index` --tokenizer.",
            )

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the index names."""
        if self.index is None or self.index.tokenizer is None or self.index_file is None:
            return None
        return self.index_file.parent / self.index.tokenizer


def find_shards(source: SourceConfig) -> ShardSet:
    """The shards that `source` names. Raises DataError when there are none, or where a directory holds several sets."""
    pattern = source.shards
    index_file = Path(source.index) if source.index else None
    require_one(pattern)
    if pattern.endswith(INDEX_SUFFIX):
        index_file, pattern = Path(_one_index(pattern)), ""
    if index_file is not None:
        return _from_index(index_file, pattern)
    paths = expand(pattern)
    if paths[0].endswith(MEMBERS_SUFFIX) and not is_remote(paths[0]):
        raise DataError(
            f"{paths[0]} is the index of a single shard, not a shard.",
            f"Name the set's index (NAME{INDEX_SUFFIX}), or its shards (*.tar).",
        )
    if os.path.isdir(pattern):
        indexes = sorted(Path(pattern).glob(f"*{INDEX_SUFFIX}"))
        if len(indexes) > 1:
            # A held-out split beside the training one must not be trained on unnoticed.
            raise DataError(
                f"{pattern} holds {len(indexes)} sets of shards: {', '.join(index.name for index in indexes)}.",
                f"Name the set's index, as {indexes[-1]}, or all shards: '{os.path.join(pattern, '*.tar')}'.",
            )
    return ShardSet(paths=paths) if is_remote(paths[0]) else _beside(paths, pattern)


def _one_index(pattern: str) -> str:
    """The index that is named, or the only one that a glob finds. Raises DataError for none, and for several."""
    if is_remote(pattern) or not is_glob(pattern):
        return pattern
    found = found_by(pattern)
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(f"No index matches {pattern!r}.", "Check the path, or make one with `d2v index`.")
    raise DataError(
        f"{pattern!r} matches {len(found)} indexes, the first two are {found[0]} and {found[1]}.",
        "A source is one set: name one index, all shards (*.tar), or each set in data.sources.",
    )


def _beside(paths: list[str], pattern: str) -> ShardSet:
    """Local shards with the indexes that lie in their directories."""
    known: dict[str, tuple[Path, SetIndex, ShardEntry]] = {}
    for directory in dict.fromkeys(os.path.dirname(path) for path in paths):
        for index_file in sorted(Path(directory).glob(f"*{INDEX_SUFFIX}")):
            index = SetIndex.load(index_file)
            for entry in index.shards:
                known[_place(entry.path, index_file)] = (index_file, index, entry)
    found = [known.get(real_place(path)) for path in paths]
    if not any(found):
        return ShardSet(paths=paths)
    unknown = [path for path, hit in zip(paths, found, strict=True) if hit is None]
    if unknown:
        raise DataError(f"{len(unknown)} shards are in no index, the first is {unknown[0]}.", _REINDEX)
    hits = [hit for hit in found if hit is not None]
    gone = sorted(filter(_names_of(pattern), known.keys() - set(map(real_place, paths))))
    if gone:
        raise DataError(f"{len(gone)} shards are in the index but do not exist, the first is {gone[0]}.", _REINDEX)
    return _join(paths, hits)


def _join(paths: list[str], hits: list[tuple[Path, SetIndex, ShardEntry]]) -> ShardSet:
    first_file, first, _ = hits[0]
    for index_file, index, _ in hits:
        if index.contents != first.contents or index.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(f"{index_file} and {first_file} are of another content or tokenizer.", _REINDEX)
    return ShardSet(
        paths=paths,
        entries=[entry for _, _, entry in hits],
        member_files=[str(index_file.parent / entry.members) for index_file, _, entry in hits],
        index=first,
        index_file=first_file,
        class_names=list({str(path): index.classes for path, index, _ in hits}.items()),
    )


def _from_index(index_file: Path, pattern: str) -> ShardSet:
    """The shards that an index file lists, all of them or those that `pattern` names. Raises DataError where it names
    one that is not in the index."""
    index = SetIndex.load(index_file)
    found = {
        entry.path if is_remote(entry.path) else os.path.join(index_file.parent, entry.path): entry
        for entry in index.shards
    }
    if pattern:
        found = _chosen(found, pattern, index_file)
    return _join(list(found), [(index_file, index, entry) for entry in found.values()])


def _chosen(found: dict[str, ShardEntry], pattern: str, index_file: Path) -> dict[str, ShardEntry]:
    """The shards of an index that `pattern` names, in the index's order."""
    listed = {_absolute(path): path for path in found} | {entry.path: path for path, entry in found.items()}
    wanted: list[str] = []
    if not is_remote(pattern) and os.path.isdir(pattern):
        wanted = list(filter(_names_of(pattern), listed)) + list(map(_absolute, found_by("*.tar", pattern)))
    else:
        for name in braces(pattern):
            if is_remote(name) or not is_glob(name):
                wanted.append(name if name in listed else _absolute(name))
                continue
            # A glob names what is in the index and what is there, in the index or not.
            named = list(filter(_names_of(name), listed)) + list(map(_absolute, found_by(name)))
            wanted += named or [name]
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise DataError(
            f"{index_file} does not list {len(missing)} of the shards of {pattern!r}, the first is {missing[0]}.",
            "Correct the pattern, or make the index again with `d2v index`.",
        )
    chosen = {listed[name] for name in wanted}
    return {path: entry for path, entry in found.items() if path in chosen}


def _place(path: str, index_file: Path) -> str:
    """Where a shard lies that an index lists, the same for all ways to write it."""
    return path if is_remote(path) else real_place(os.path.join(index_file.parent, path))


def _absolute(path: str) -> str:
    """The same for all ways to write a local path; what is not local as it is."""
    return path if is_remote(path) else real_place(path)


def _names_of(pattern: str) -> Callable[[str], bool]:
    """Whether `pattern` would find a local path if it were there, however the two are written."""
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(os.path.realpath(pattern)), "*.tar")
    globs = [os.path.split(name) for name in braces(pattern)]
    folders = [({os.path.realpath(one) for one in found_by(folder)}, folder, name) for folder, name in globs]

    def is_named(path: str) -> bool:
        if is_remote(path):
            return False
        its_folder, its_name = os.path.split(real_place(path))
        return any(
            (its_folder in known or _matches(its_folder, os.path.realpath(folder)))
            and (its_name == name or fnmatch.fnmatchcase(its_name, name))
            for known, folder, name in folders
        )

    return is_named


def _matches(path: str, pattern: str) -> bool:
    names, parts = Path(path).parts, Path(pattern).parts
    return len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts))


def check_before_start(shards: ShardSet, source: SourceConfig, reads: Content, max_bad_ratio: float) -> list[str]:
    """Compare local shards with their index; returns warnings. Looks at the sizes of at most 2,000 shards, and at the
    first and last sample of 32 of them and of those that have another size than when they were indexed.

    A shard that lost its end is reported, and survived up to `max_bad_ratio` of the samples. A shard that is not the
    one that was indexed, or that cannot be read, raises DataError, as does one of shards that hold
    something else than what the source's stem `reads`.
    """
    assert shards.index is not None
    if shards.index.content != reads:
        held = " with ".join(plural(content) for content in shards.index.contents)
        raise DataError(
            f"{shards.index_file}: the shards hold {held}, but the stem {source.modality!r} reads {plural(reads)}.",
            "Correct the source's modality or its path.",
        )
    if int(shards.samples_s.sum()) == 0:
        raise DataError(f"The shards of {source.shards!r} hold no sample.", "Check the path.")
    if (known := sum(entry.lost for entry in shards.entries)) == int(shards.samples_s.sum()):
        raise DataError(
            f"None of the {known} samples of {source.shards!r} could be read when they were indexed.",
            "See `d2v inspect`, and correct source.modality or the shards.",
        )
    warnings, lost, looked_at = [], 0, 0
    if shards.index.format < FORMAT:
        warnings.append(
            f"{shards.index_file} was made by an earlier version (index format {shards.index.format}), which trusted "
            "what recordings say of their length, counted empty documents and passed over links and further archives. "
            f"{_REINDEX}"
        )
    damaged = [(path, entry.damage) for path, entry in zip(shards.paths, shards.entries, strict=True) if entry.damage]
    if damaged:
        # Unreadable documents have no tokens to plan: what they would have given is in no count but this.
        warnings.append(
            f"{len(damaged)} of {len(shards.paths)} shards were damaged when they were indexed, the first: "
            f"{damaged[0][0]}: {'; '.join(damaged[0][1][:3])}"
        )
    looked_into = set(_spread(len(shards.paths), _LOOKED_INTO))
    for shard in _spread(len(shards.paths), _CHECKED_AT_START):
        path, entry = shards.paths[shard], shards.entries[shard]
        if is_remote(path):
            continue
        looked_at += entry.samples
        try:
            with open(path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size == entry.bytes and shard not in looked_into:
                    continue
                cut_off = _compare(stream, size, path, shards.members(shard), entry)
        except OSError as error:
            raise DataError(f"The shard {path} cannot be read: {error.strerror}.", _REINDEX) from error
        if cut_off:
            warnings.append(f"{path} ends {entry.bytes - size} bytes early: {cut_off} of {entry.samples} samples lost")
            lost += cut_off
    if lost > max_bad_ratio * looked_at:
        raise DataError(
            f"{lost} of {looked_at} samples are cut off ({'; '.join(warnings[:3])}), "
            f"more than data.max_bad_ratio={max_bad_ratio}.",
            _REINDEX,
        )
    return warnings


def _spread(shards: int, most: int) -> list[int]:
    """At most `most` shards, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, shards - 1, most).astype(int)).tolist()


def _compare(stream: "os.PathLike[str] | object", size: int, path: str, members: Members, entry: ShardEntry) -> int:
    """How many samples lie beyond the end of the file. Raises DataError where the tar is another one."""
    if size > entry.bytes:
        raise DataError(f"{path} is {size} bytes long, its index says {entry.bytes}.", _REINDEX)
    inside = np.flatnonzero(members.start_n + members.size_n <= size)
    for number in dict.fromkeys(inside[[0, -1]].tolist() if len(inside) else []):
        stream.seek(int(members.start_n[number]))  # type: ignore[union-attr]
        try:
            header = tarfile.TarInfo.frombuf(stream.read(512), "utf-8", "surrogateescape")  # type: ignore[union-attr]
        except tarfile.TarError:
            # A damaged header: found and counted when the sample is read.
            continue
        expected = members.keys_n[number].decode("utf-8", "surrogateescape")
        if header.isreg() and not header.name.startswith(expected + "."):
            raise DataError(f"{path} holds {shown(header.name)} where its index says {shown(expected)}.", _REINDEX)
    return len(members) - len(inside)
