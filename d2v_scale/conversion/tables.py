"""Tables of texts: rows of a .tsv, whose fields are not quoted, or of a .csv, whose fields may be."""

import csv
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from d2v_scale.errors import DataError

_DELIMITERS = (",", ";", "\t", "|")


@dataclass
class Columns:
    """Where a table has its texts and its label: names from its first line or JSON's keys, or numbers from 1 in a
    table without names."""

    first: str
    second: str | None
    label: str | None

    @staticmethod
    def parse(text: str) -> "Columns":
        """`TEXT`, `TEXT,LABEL` or `TEXT,SECOND TEXT,LABEL`. Raises DataError."""
        names = text.split(",")
        if not 1 <= len(names) <= 3 or not all(names):
            raise DataError(
                f"--columns {text!r} names {len(names)} columns.", "Write TEXT, TEXT,LABEL or TEXT,TEXT,LABEL."
            )
        return Columns(names[0], names[1] if len(names) == 3 else None, names[-1] if len(names) > 1 else None)

    @property
    def names(self) -> list[str]:
        """Those that there are, in their order."""
        return [name for name in (self.first, self.second, self.label) if name is not None]


@dataclass
class TableRow:
    """What a row holds in the columns that are read."""

    line: int
    """The last line of the file that it takes."""
    first: str = ""
    second: str | None = None
    label: str | None = None
    fault: str | None = None


def rows(path: Path, stream: TextIO, columns: Columns | None, quoted: bool) -> Iterator[TableRow]:
    """The rows behind the header. Of a .csv the delimiter is the one that the header has its columns with.

    Raises DataError for a table without the columns, or when they are not given.
    """
    if columns is None:
        raise DataError(f"{path} is a table.", "Name its columns with --columns TEXT, TEXT,LABEL or TEXT,TEXT,LABEL.")
    for line, values, fault in cells(path, stream, columns.names, quoted):
        if fault is not None:
            yield TableRow(line, fault=fault)
            continue
        second, label = (None if name is None else values[name] for name in (columns.second, columns.label))
        yield TableRow(line, values[columns.first], second, label)


def cells(
    path: Path, stream: TextIO, names: list[str], quoted: bool
) -> Iterator[tuple[int, dict[str, str], str | None]]:
    """Of each row behind the header: the last line of the file that it takes, what it holds in the columns `names`, and
    why it cannot be used, if so. Raises DataError for a table without the columns."""
    csv.field_size_limit(sys.maxsize)  # of documents, not of cells
    begins = stream.readline()
    if not begins:
        return
    delimiter = _delimiter(begins, names) if quoted else "\t"
    lines = itertools.chain([begins], stream)
    if quoted:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    else:  # in GLUE's tables a quotation mark is a character like any other
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    width: int | None = None
    if all(name.isdecimal() and int(name) > 0 for name in names):
        places = [int(name) - 1 for name in names]
    else:
        header = next(reader, [])
        missing = [name for name in names if name not in header]
        if missing:
            raise DataError(
                f"{path} has no column {missing[0]!r}.", f"It has: {', '.join(header)}; or give numbers from 1."
            )
        width, places = len(header), [header.index(name) for name in names]
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, {}, f"is no row of a table: {error}"
            continue
        if not row:
            continue
        if len(row) <= max(places) or (width is not None and any(row[width:])):
            wanted = max(places) + 1 if width is None else width
            yield reader.line_num, {}, f"has {len(row)} columns, not {wanted}"
        else:
            yield reader.line_num, dict(zip(names, (row[place] for place in places), strict=True)), None


def header_of(stream: TextIO, wanted: list[str], quoted: bool) -> list[str]:
    """The names in a table's first line. `wanted`: what some of them may be, which tells a .csv's delimiter."""
    begins = stream.readline()
    if quoted:
        return next(csv.reader([begins], delimiter=_delimiter(begins, wanted)), [])
    return next(csv.reader([begins], delimiter="\t", quoting=csv.QUOTE_NONE), [])


def _delimiter(header: str, names: list[str]) -> str:
    def found(delimiter: str) -> tuple[int, int]:
        fields = next(csv.reader([header], delimiter=delimiter), [])
        return sum(name in fields for name in names), len(fields)

    return max(_DELIMITERS, key=found)
