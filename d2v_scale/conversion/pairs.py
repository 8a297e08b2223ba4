"""`d2v shards pairs`: rows of a table, each a sample of the parts that it has.

An empty cell is a part that the sample does not have, and is counted. A row with a part that cannot be read is named
and left out whole: half of it would look as if the other half had never been there.
"""

import argparse
import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2v_scale.conversion import tables, text_files
from d2v_scale.conversion.array_members import EXTENSIONS as ARRAY_EXTENSIONS
from d2v_scale.conversion.array_members import ArrayReading, array_members
from d2v_scale.conversion.arrays import usual_layout
from d2v_scale.conversion.command import classes_of
from d2v_scale.conversion.converters import NewShard, file_version, image_members, recording_members
from d2v_scale.conversion.folders import last_extension
from d2v_scale.conversion.held_out_captions import note, require_apart
from d2v_scale.conversion.measures import measures_of
from d2v_scale.conversion.missing_parts import tell_of_missing
from d2v_scale.conversion.new_sets import NewSet
from d2v_scale.conversion.texts import given_tokenizer
from d2v_scale.errors import DataError
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.text.decoder import require_text
from d2v_scale.modalities.text.tokenizer import tokenizer_sha256
from d2v_scale.modalities.vision import decoder as vision
from d2v_scale.shards.content import Content
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.shard_jobs import Part
from d2v_scale.shards.writing import Sample, write_shard

PARTS: dict[str, Content] = {"image": "image", "audio": "recording", "array": "array", "text": "text"}
"""Columns, by the names that they have unless others are given, and what they hold."""
LABEL = "label"
FACTS = ("concept", "category")
"""Columns that are kept beside the sample, in `.json`, for `d2v align`: what it is of, and what kind of thing that is.
"""

_RULES = 1
"""Raised where what is stored of the same rows changes: shards that were written before are written again."""
_EXTENSIONS: dict[str, tuple[str, ...]] = {
    "image": vision.EXTENSIONS,
    "audio": speech.EXTENSIONS,
    "array": ARRAY_EXTENSIONS,
}


@dataclass
class Pair:
    """A row of the table."""

    name: str
    place: str
    parts: dict[str, str] = field(default_factory=dict)
    """By column: the path of a file, or the text; without those that it does not have."""
    label: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    """Of `FACTS`, what the row says."""
    fault: str | None = None
    """Why there will be no sample."""


@dataclass
class Pairing:
    """How samples are made of rows."""

    parts: list[str]
    """Of `PARTS`: what samples may have."""
    classes: list[str]
    tokenizer: Path | None = None
    resize: int | None = None
    max_pixels: int = 0
    arrays: ArrayReading = field(default_factory=ArrayReading)

    @property
    def contents(self) -> list[Content]:
        """What every sample holds."""
        return [PARTS[part] for part in self.parts]


@dataclass
class Job(NewShard):
    """A shard of rows."""

    pairing: Pairing
    tokenizer_sha256: str | None
    pairs: list[Pair]

    def digest(self) -> str:
        inputs = asdict(self.pairing) | {"tokenizer": self.tokenizer_sha256, "rules": _RULES}
        state = hashlib.sha256(repr(inputs).encode())
        for pair in self.pairs:
            files = [pair.parts[part] for part in pair.parts if part in _EXTENSIONS]
            versions = [file_version(path) for path in files]
            state.update(repr((pair, versions)).encode("utf-8", "backslashreplace"))
        return state.hexdigest()

    def run(self) -> Part:
        skipped: dict[str, str] = {}
        measures = measures_of(self.pairing.contents, self.pairing.tokenizer, self.pairing.max_pixels)
        first, *others = measures.items()
        entry = write_shard(self.tar, self._samples(dict(measures), skipped), first[1], dict(others))
        return Part("", asdict(entry), skipped)

    def _samples(self, measures: dict[Content, Any], skipped: dict[str, str]) -> Iterator[Sample]:
        numbers = {name: number for number, name in enumerate(self.pairing.classes)}
        for pair in self.pairs:
            sample: Sample = {"__key__": pair.name}
            fault = pair.fault
            for part in pair.parts if fault is None else ():
                try:
                    sample |= self._members(part, pair.parts[part])
                    measures[PARTS[part]]({name: one for name, one in sample.items() if name != "__key__"})
                except Exception as error:  # whatever a damaged file makes a decoder raise
                    known = isinstance(error, (ValueError, OSError))
                    reason = str(error) if known else f"{type(error).__name__}: {error}"
                    shown = f" {pair.parts[part]}" if part in _EXTENSIONS else ""
                    fault = f"its {part}{shown}: {reason}"
                    break
            if fault is not None:
                skipped[pair.place] = fault
                continue
            if pair.label is not None:
                sample["cls"] = numbers[pair.label]
            if pair.facts:
                sample["json"] = json.dumps(pair.facts, ensure_ascii=False).encode()
            yield sample

    def _members(self, part: str, value: str) -> dict[str, bytes]:
        if part == "text":
            return {"txt": require_text(value).encode()}
        path = Path(value)
        extension = last_extension(path)
        if extension not in _EXTENSIONS[part]:
            raise ValueError(f"is none of .{', .'.join(_EXTENSIONS[part])}")
        content = path.read_bytes()
        match part:
            case "image":
                return image_members(content, extension, self.pairing.resize, self.pairing.max_pixels)
            case "audio":
                return recording_members(content)
        return array_members(content, extension, self.pairing.arrays)


def convert_pairs(arguments: argparse.Namespace, new: NewSet) -> tuple[SetIndex, int] | None:
    """Convert the rows of a table to shards and write their index; returns it, and how many rows were left out; None
    where other parts of the work are to be done yet. Raises DataError."""
    table = arguments.source
    columns = _columns(arguments)
    parts = [part for part in PARTS if part in columns]
    pairs = list(_pairs(table, columns, parts, arguments.encoding, complete=arguments.complete))
    if not pairs:
        raise DataError(f"{table} has no rows.")
    sound = [pair for pair in pairs if pair.fault is None]
    tell_of_missing(table, len(sound), {part: sum(part not in pair.parts for pair in sound) for part in parts})
    pairing = Pairing(parts, classes_of((pair.label for pair in sound), new.known_classes()))
    if "image" in parts:
        pairing.resize, pairing.max_pixels = arguments.resize, arguments.max_pixels
    if "array" in parts:
        pairing.arrays.layout = usual_layout(
            [Path(pair.parts["array"]) for pair in sound if "array" in pair.parts], pairing.arrays
        )
    checksum = None
    captions = {pair.place: pair.parts["text"] for pair in sound if "text" in pair.parts}
    if "text" in parts:
        if not arguments.shared_captions:
            require_apart(captions, new.out, new.prefix)
        pairing.tokenizer = given_tokenizer(arguments, lambda: iter(captions.values()))
        checksum = tokenizer_sha256(pairing.tokenizer)
    elif arguments.tokenizer is not None:
        raise DataError("--tokenizer is given, but no column is text.", "Leave it out.")
    print(f"{len(pairs):,} rows of {', '.join(columns)}", file=sys.stderr)
    done = new.run(_jobs(new, pairs, pairing, checksum), len(pairs))
    if done is None:
        return None
    first, *beside = pairing.contents
    index = SetIndex(content=first, beside=beside, shards=[], classes=pairing.classes)
    skipped = new.save(index, done, pairing.tokenizer, what="rows", cure="Mend or remove the rows named above")
    if captions:
        note(captions.values(), new.out, new.prefix)
    return index, skipped


def _jobs(new: NewSet, pairs: list[Pair], pairing: Pairing, checksum: str | None) -> Iterator[Job]:
    for number, start in enumerate(range(0, len(pairs), new.per_shard)):
        yield Job(new.tar(number), pairing, checksum, pairs[start : start + new.per_shard])


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    """The table's columns: those that are named, and of the others those that it has by their usual names. Raises
    DataError where these are fewer than two parts of a sample."""
    table: Path = arguments.source
    kind = text_files.kind_of(table)
    if kind not in text_files.TABLES:
        raise DataError(f"{table} is no table.", f"Give a .{' or .'.join(text_files.TABLES)}.")
    read = (*PARTS, LABEL, *FACTS)
    given = {name: getattr(arguments, name) for name in read}
    named = {name: column for name, column in given.items() if column is not None}
    if len(set(named.values())) < len(named):
        shown = ", ".join(f"--{name} {column}" for name, column in named.items())
        raise DataError(f"A column is named twice: {shown}.", "Give each its own.")
    numbered = bool(named) and all(column.isdecimal() and int(column) > 0 for column in named.values())
    try:
        with text_files.opened(table, arguments.encoding, newline="") as stream:
            header = tables.header_of(stream, [*read, *named.values()], kind == "csv")
    except (*text_files.UNREADABLE, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {error}.", "See --encoding.") from error
    taken = set(named.values())
    usual = {} if numbered else {n: n for n in read if n not in named and n in header and n not in taken}
    columns = named | usual
    if sum(part in columns for part in PARTS) < 2:
        found = ", ".join(columns) or "none"
        raise DataError(
            f"A pair needs two of image, audio, array and text; of {table} these columns are read: {found}.",
            f"Name its columns, as --image NAME --text NAME; it has: {', '.join(header)}.",
        )
    return columns


def _pairs(
    table: Path, columns: dict[str, str], parts: list[str], encoding: str | None, *, complete: bool
) -> Iterator[Pair]:
    """The rows in a fixed random order. Paths are relative to the table. `complete`: a row has to have all parts."""
    found: list[Pair] = []
    try:
        with text_files.opened(table, encoding, newline="") as stream:
            quoted = text_files.kind_of(table) == "csv"
            for line, values, fault in tables.cells(table, stream, list(columns.values()), quoted):
                pair = Pair("", f"{table}:{line}", fault=fault)
                if fault is None:
                    _fill(
                        pair, {name: values[column] for name, column in columns.items()}, parts, table.parent, complete
                    )
                found.append(pair)
    except text_files.UNREADABLE as error:
        raise DataError(f"{table} cannot be read: {error}.", "See --encoding.") from error
    for number, k in enumerate(np.random.default_rng(0).permutation(len(found))):
        files = [Path(value).stem for part, value in found[k].parts.items() if part in _EXTENSIONS]
        found[k].name = f"{number:08d}-{re.sub(r'[^0-9A-Za-z_-]+', '_', files[0])[:80] if files else 'row'}"
        yield found[k]


def _fill(pair: Pair, values: dict[str, str], parts: list[str], folder: Path, complete: bool) -> None:
    there = [part for part in parts if values[part].strip()]
    missing = [part for part in parts if part not in there]
    if not there or (complete and missing):
        pair.fault = f"has no {' and no '.join(missing)}"
        return
    pair.parts = {part: str(folder / values[part].strip()) if part in _EXTENSIONS else values[part] for part in there}
    pair.label = values.get(LABEL, "").strip() or None
    pair.facts = {name: values[name].strip() for name in FACTS if values.get(name, "").strip()}
    for name, said in {LABEL: pair.label or "a", **pair.facts}.items():
        try:
            require_text(said)
        except ValueError as error:
            pair.fault = f"its {name} {error}"
