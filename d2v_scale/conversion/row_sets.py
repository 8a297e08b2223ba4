"""`d2v shards dataset`: rows of Parquet and Arrow files, pictures and sounds as bytes in their cells, to shards.

An empty cell is a part that a sample of several does not have, and is counted, as in `d2v shards pairs`.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2v_scale.conversion.array_members import ArrayReading, Layout, array_members, npy_bytes
from d2v_scale.conversion.command import classes_of
from d2v_scale.conversion.converters import NewShard, file_version, finite_number, image_members, recording_members
from d2v_scale.conversion.held_out_captions import note, require_apart
from d2v_scale.conversion.measures import measures_of
from d2v_scale.conversion.missing_parts import tell_of_missing
from d2v_scale.conversion.new_sets import NewSet
from d2v_scale.conversion.row_columns import RowColumns, bytes_of, extension_of, find_columns
from d2v_scale.conversion.row_files import RowFile, row_files, rows_of
from d2v_scale.conversion.texts import given_tokenizer
from d2v_scale.errors import DataError
from d2v_scale.modalities.text.decoder import require_text
from d2v_scale.modalities.text.tokenizer import tokenizer_sha256
from d2v_scale.shards.content import Content
from d2v_scale.shards.shard_index import SetIndex, ShardEntry
from d2v_scale.shards.shard_jobs import Part
from d2v_scale.shards.writing import Sample, write_shard

_CONTENTS: dict[str, Content] = {"image": "image", "audio": "recording", "array": "array", "text": "text"}
_RULES = 2
"""Raised where what is stored of the same rows changes: shards that were written before are written again."""
_LOOKED_INTO = 100
_TRAINED_ON = 1_000_000


@dataclass(frozen=True)
class Rows:
    """A stretch of rows of a file."""

    path: str
    start: int
    count: int


@dataclass
class RowReading:
    """How rows become samples."""

    columns: RowColumns
    contents: list[Content]
    """What samples may hold. A text beside a recording alone may be a transcript, and is none of these then."""
    complete: bool = False
    """A row that lacks a part is left out."""
    classes: list[str] = field(default_factory=list)
    tokenizer: Path | None = None
    resize: int | None = None
    max_pixels: int = 0
    layout: Layout | None = None
    """Of arrays."""

    def cells(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the row has of each part, without those that it does not have. Raises ValueError where these are all, or
        any where a sample has to have all."""
        found = {part: row[getattr(self.columns, part)] for part in self.columns.parts}
        missing = [part for part, value in found.items() if _is_empty(value)]
        # A recording is stored with its transcript or not at all, as of a folder with transcripts.
        if len(missing) == len(found) or (missing and (self.complete or len(self.contents) == 1)):
            raise ValueError(f"has no {' and no '.join(missing)}")
        return {part: value for part, value in found.items() if part not in missing}

    def members(self, row: dict[str, Any], cells: dict[str, Any], folder: Path) -> dict[str, Any]:
        """A sample's members, of a row and its `cells`. Raises ValueError and OSError, which name the part."""
        sample: dict[str, Any] = {}
        columns = self.columns
        for part, value in cells.items():
            try:
                sample |= self._members_of(part, value, folder)
            except (ValueError, OSError) as error:
                raise ValueError(f"its {part}: {error}") from None
        if columns.second is not None:
            sample["txt2"] = require_text(str(row[columns.second] or "")).encode()
        return sample | (self._label(row[columns.label]) if columns.label is not None else {})

    def _members_of(self, part: str, value: Any, folder: Path) -> dict[str, bytes]:
        if part == "text":
            if not isinstance(value, str):
                raise ValueError(f"is a {type(value).__name__}, no text")
            return {"txt": require_text(value).encode()}
        if part == "array":
            values = np.asarray(value, dtype=self.columns.array_type)
            values = values[None] if values.ndim == 1 else values
            return array_members(npy_bytes(values), "npy", ArrayReading(layout=self.layout))
        content, path = bytes_of(value)
        if not content:
            content = (folder / path).read_bytes()
        if part == "audio":
            return recording_members(content)
        extension = extension_of(content) or Path(path).suffix[1:].lower()
        return image_members(content, extension, self.resize, self.max_pixels)

    def label_of(self, value: Any) -> str | None:
        """The name of a row's class; None: it has none."""
        if value is None or (self.columns.names is not None and value == -1):
            return None
        if self.columns.names is None:
            return str(value).strip() or None
        if not 0 <= int(value) < len(self.columns.names):
            raise ValueError(f"its label is {value}, and there are {len(self.columns.names)} classes")
        return self.columns.names[int(value)]

    def _label(self, value: Any) -> dict[str, Any]:
        if self.columns.is_score:
            return {} if value is None else {"score": str(finite_number(str(value))).encode()}
        name = self.label_of(value)
        return {} if name is None else {"cls": self.classes.index(name)}


@dataclass
class RowJob(NewShard):
    """A shard of rows."""

    reading: RowReading
    tokenizer_sha256: str | None
    stretches: list[Rows]
    first: int
    """Number of its first row in the table, from 0."""

    def digest(self) -> str:
        how = asdict(self.reading) | {"tokenizer": self.tokenizer_sha256, "rules": _RULES}
        versions = [(asdict(rows), file_version(rows.path)) for rows in self.stretches]
        return hashlib.sha256(repr((how, self.first, versions)).encode("utf-8", "backslashreplace")).hexdigest()

    def run(self) -> Part:
        skipped: dict[str, str] = {}
        measures = measures_of(self.reading.contents, self.reading.tokenizer, self.reading.max_pixels)
        first, *others = measures.items()
        entry = write_shard(self.tar, self._samples(measures, skipped), first[1], dict(others))
        return Part("", asdict(entry), skipped)

    def _samples(self, measures: dict[Content, Any], skipped: dict[str, str]) -> Iterator[Sample]:
        number = self.first
        for rows in self.stretches:
            done = 0
            try:
                for row in rows_of(Path(rows.path), self.reading.columns.read, rows.start, rows.count):
                    place = f"{rows.path}, row {rows.start + done}"
                    done += 1
                    try:
                        cells = self.reading.cells(row)
                        members = self.reading.members(row, cells, Path(rows.path).parent)
                        for content in {_CONTENTS[part] for part in cells} & set(measures):
                            measures[content](members)
                    except Exception as error:  # whatever a damaged file makes a decoder raise
                        known = isinstance(error, ValueError)
                        skipped[place] = str(error) if known else f"{type(error).__name__}: {error}"
                        continue
                    yield {"__key__": f"{number + done - 1:09d}", **members}
            except (OSError, ValueError) as error:  # of the table itself, which ends here
                for lost in range(rows.start + done, rows.start + rows.count):
                    skipped[f"{rows.path}, row {lost}"] = f"cannot be read: {error}"
            number += rows.count


def convert_rows(arguments: argparse.Namespace, new: NewSet) -> tuple[SetIndex, int] | None:
    """Convert the rows of SRC to shards and write their index; returns it, and how many were left out; None where other
    parts of the work are to be done yet. Raises DataError."""
    found, files = row_files(arguments.source, arguments.match)
    if found.left_out():
        print(found.left_out(), file=sys.stderr)
    total = sum(file.rows for file in files)
    if not total:
        raise DataError(f"{arguments.source} has no rows.")
    names = ("image", "audio", "array", "text", "second", "label")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    columns = find_columns(next(file.path for file in files if file.rows), given)
    contents = [_CONTENTS[part] for part in columns.parts]
    if columns.parts == ["audio", "text"] and not arguments.pairs:
        contents = ["recording"]  # the text is its transcript
    print(f"{total:,} rows: {columns}", file=sys.stderr)
    reading = RowReading(columns, contents, complete=arguments.complete)
    reading.classes = _classes(files, reading, new.known_classes())
    if "image" in contents:
        reading.resize, reading.max_pixels = arguments.resize, arguments.max_pixels
    if "array" in contents:
        reading.layout = _usual_layout(files[0], reading)
    checksum, captions = None, _captions(files, columns) if "text" in contents and len(contents) > 1 else {}
    if captions and not arguments.shared_captions:
        require_apart(captions, new.out, new.prefix)
    if "text" in contents:
        reading.tokenizer = given_tokenizer(arguments, lambda: _texts(files, columns))
        checksum = tokenizer_sha256(reading.tokenizer)
    elif arguments.tokenizer is not None:
        raise DataError("--tokenizer is given, but no text is counted in tokens.", "Leave it out.")
    done = new.run(_jobs(new, files, reading, checksum), total)
    if done is None:
        return None
    if len(contents) > 1:
        entries = [ShardEntry(**part.entry) for part in done]
        lacking = np.sum([[entry.lost, *entry.lost_beside] for entry in entries], axis=0, dtype=int).tolist()
        kept = sum(entry.samples for entry in entries)
        tell_of_missing(arguments.source, kept, dict(zip(columns.parts, lacking, strict=True)))
    index = SetIndex(content=contents[0], beside=contents[1:], shards=[], classes=reading.classes)
    skipped = new.save(index, done, reading.tokenizer, what="rows", cure="Mend the rows named above")
    if captions:
        note(captions.values(), new.out, new.prefix)
    return index, skipped


def _is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: no text but white space, neither bytes nor a path."""
    if isinstance(value, dict):
        content, path = bytes_of(value)
        return not content and not path
    return value is None or (isinstance(value, str) and not value.strip()) or value == b""


def _jobs(new: NewSet, files: list[RowFile], reading: RowReading, checksum: str | None) -> Iterator[RowJob]:
    """Rows in their order; a shard may go on in the next file."""
    number = first = room = 0
    stretches: list[Rows] = []
    for file in files:
        start = 0
        while start < file.rows:
            room = new.per_shard - sum(rows.count for rows in stretches)
            stretches.append(Rows(str(file.path), start, min(room, file.rows - start)))
            start += stretches[-1].count
            if stretches[-1].count == room:
                yield RowJob(new.tar(number), reading, checksum, stretches, first)
                number, first, stretches = number + 1, first + new.per_shard, []
    if stretches:
        yield RowJob(new.tar(number), reading, checksum, stretches, first)


def _column(files: list[RowFile], name: str) -> Iterator[Any]:
    for file in files:
        try:
            yield from (row[name] for row in rows_of(file.path, [name]))
        except (OSError, ValueError):  # said where it is converted
            continue


def _classes(files: list[RowFile], reading: RowReading, known: list[str]) -> list[str]:
    columns = reading.columns
    if columns.label is None or columns.is_score:
        return []
    if columns.names is not None:
        classes_of(columns.names, known)
        return known or columns.names
    return classes_of({reading.label_of(value) for value in _column(files, columns.label)}, known)


def _texts(files: list[RowFile], columns: RowColumns) -> Iterator[str]:
    """Of the first million rows."""
    assert columns.text is not None
    for number, text in enumerate(_column(files, columns.text)):
        if number == _TRAINED_ON:
            return
        if isinstance(text, str) and text.strip():
            yield text


def _captions(files: list[RowFile], columns: RowColumns) -> dict[str, str]:
    assert columns.text is not None
    texts = enumerate(_column(files, columns.text))
    return {f"row {number} of the table": text for number, text in texts if isinstance(text, str) and text.strip()}


def _usual_layout(file: RowFile, reading: RowReading) -> Layout | None:
    """Of the first arrays that can be read the commonest."""
    assert reading.columns.array is not None
    counts: dict[Layout, int] = {}
    for row in rows_of(file.path, [reading.columns.array], 0, _LOOKED_INTO):
        try:
            if _is_empty(row[reading.columns.array]):
                continue
            values = np.asarray(row[reading.columns.array], dtype=reading.columns.array_type)
            layout = Layout.of((values[None] if values.ndim == 1 else values).shape)
        except ValueError:
            continue
        counts[layout] = counts.get(layout, 0) + 1
    return max(counts, key=counts.__getitem__, default=None)
