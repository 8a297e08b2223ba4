"""Documents in files: plain text, JSONL, and tables (.tsv, as GLUE's), with labels and pairs where there are any."""

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from d2v_scale.errors import DataError


@dataclass
class Document:
    """One text, or a pair of texts."""

    text: str
    label: str | None = None
    second: str | None = None


@dataclass
class Columns:
    """Where a table has its texts and its label: names from its first line or JSONL's keys, or numbers from 1 in a
    table without names."""

    first: str
    second: str | None
    label: str

    @staticmethod
    def parse(text: str) -> "Columns":
        """`TEXT,LABEL` or `TEXT,SECOND TEXT,LABEL`. Raises DataError."""
        names = text.split(",")
        if len(names) not in (2, 3):
            raise DataError(f"--columns {text!r} names {len(names)} columns.", "Write TEXT,LABEL or TEXT,TEXT,LABEL.")
        return Columns(names[0], names[1] if len(names) == 3 else None, names[-1])


JSONL = Columns("text", "text2", "label")
"""The keys of JSONL, unless others are named."""


def documents(files: list[Path], split: str, columns: Columns | None) -> Iterator[Document]:
    """All documents. `split`: a document of a .txt file is the `file`, a `paragraph` or a `line` of it.

    A line of JSONL or of a table that is none becomes an empty document. Raises DataError for a table without the
    `columns`, or when they are not given.
    """
    for path in files:
        # Some of GLUE's tables begin with a byte order mark, which is no part of the first column's name.
        newline = "" if path.suffix == ".tsv" else None
        with path.open(encoding="utf-8-sig", errors="replace", newline=newline) as stream:
            if path.suffix == ".jsonl":
                keys = columns or JSONL
                for line in stream:
                    record = _parse(line)
                    label, second = record.get(keys.label), record.get(keys.second or "")
                    yield Document(
                        str(record.get(keys.first, "")),
                        None if label is None else str(label),
                        None if second is None else str(second),
                    )
            elif path.suffix == ".tsv":
                yield from _rows(path, stream, columns)
            elif split == "file":
                yield Document(stream.read())
            elif split == "line":
                yield from (Document(line) for line in stream if line.strip())
            else:
                for blank, lines in itertools.groupby(stream, lambda line: not line.strip()):
                    if not blank:
                        yield Document("".join(lines))


def _rows(path: Path, stream: TextIO, columns: Columns | None) -> Iterator[Document]:
    if columns is None:
        raise DataError(f"{path} is a table.", "Name its columns with --columns TEXT,LABEL or TEXT,TEXT,LABEL.")
    # GLUE's tables are not quoted: a quotation mark is a character like any other.
    lines = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    names = [name for name in (columns.first, columns.second, columns.label) if name is not None]
    if all(name.isdigit() for name in names):
        places = [int(name) - 1 for name in names]
    else:
        header = next(lines, [])
        missing = [name for name in names if name not in header]
        if missing:
            raise DataError(
                f"{path} has no column {missing[0]!r}.", f"It has: {', '.join(header)}; or give numbers from 1."
            )
        places = [header.index(name) for name in names]
    for line in lines:
        if len(line) <= max(places):
            yield Document("")
        else:
            values = [line[place] for place in places]
            yield Document(values[0], values[-1], values[1] if len(values) == 3 else None)


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def transcripts(path: Path) -> dict[str, str]:
    """Texts by file, from lines `path below the recordings, without ending`, a tab or a space, `text`. LibriSpeech's
    `.trans.txt` files, joined, are of this kind. Raises DataError."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    pairs = (line.split(maxsplit=1) for line in lines if line.strip())
    return {parts[0]: parts[1] if len(parts) > 1 else "" for parts in pairs}
