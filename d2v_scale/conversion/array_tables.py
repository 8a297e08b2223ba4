"""Tables of numbers as arrays: a column is a channel, a row a step in time."""

import array
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2v_scale.conversion.text_files import encoding_of

_DELIMITERS = (",", ";", "\t", "|")
_MISSING = {"", "na", "n/a", "null", "none"}
"""Cells that hold no number; what `float` calls NaN is one, too."""


@dataclass
class TableReading:
    """How tables of numbers are read."""

    columns: list[str] | None = None
    """Names from the first line, or numbers from 1 on; None: all."""
    delimiter: str | None = None
    """None: the one that the first line has; a space is any white space."""
    header: bool | None = None
    """Whether the first line names the columns; None: as it looks."""


def read_table(content: bytes, reading: TableReading) -> NDArray[np.float32]:
    """(columns, rows): NaN where a cell is empty. A first column whose name is empty names the rows, and is left out.

    Raises ValueError, which names line and column, for what is no table of numbers.
    """
    if not content.strip():
        raise ValueError("is empty")
    try:
        lines = _lines(content, reading.delimiter)
        line, first = next(lines)
        names = first if _is_header(first, reading) else None
        places = _places(first, names, reading.columns)
        held = array.array("d")
        if names is None:
            held.extend(_numbers(first, line, places))
        for line, row in lines:
            if len(row) < len(first) or any(cell.strip() for cell in row[len(first) :]):
                raise ValueError(f"has {len(row)} columns in line {line}, not {len(first)}")
            held.extend(_numbers(row, line, places))
    except UnicodeError as error:
        raise ValueError(f"is no text: {error}") from None
    except csv.Error as error:
        raise ValueError(f"is no table: {error}") from None
    if not held:
        raise ValueError("holds no rows of numbers")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is refused
        return np.frombuffer(held).reshape(-1, len(places)).T.astype(np.float32)


def _lines(content: bytes, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not empty, by number from 1."""
    text = io.TextIOWrapper(io.BytesIO(content), encoding=encoding_of(content[:4]), newline="")
    first = next(line for line in text if line.strip())
    text.seek(0)
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=lambda one: len(next(csv.reader([first], delimiter=one))))
        delimiter = delimiter if delimiter in first else " "
    if delimiter == " ":
        yield from ((number, line.split()) for number, line in enumerate(text, start=1) if line.strip())
        return
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    for row in reader:
        if row and (len(row) > 1 or row[0].strip()):
            yield reader.line_num, row


def _is_header(first: list[str], reading: TableReading) -> bool:
    """Raises ValueError where nobody could tell."""
    if reading.header is not None:
        return reading.header
    if reading.columns is not None and not _numbered(reading.columns):
        return True
    cells = [cell.strip() for cell in first]
    rows_named = cells[0] == "" and len(cells) > 1
    # As pandas writes a table whose columns have no names.
    if cells[rows_named:] == [str(k) for k in range(len(cells) - rows_named)] and (rows_named or len(cells) > 2):
        if rows_named:
            return True
        raise ValueError("has a first line of 0, 1, 2 ...: names or values? Say with --header yes or no")
    if reading.columns is not None:  # by number; what else stands there is of no matter
        cells = [cells[place] for place in _places(first, None, reading.columns)]
    words = sum(not _is_number(cell) for cell in cells)
    if 0 < words < sum(cell.lower() not in _MISSING for cell in cells):
        raise ValueError("has words and numbers in its first line: names or values? Say with --header yes or no")
    return words > 0


def _places(first: list[str], names: list[str] | None, columns: list[str] | None) -> list[int]:
    if columns is None:
        rows_named = names is not None and len(names) > 1 and not names[0].strip()
        return list(range(int(rows_named), len(first)))
    if _numbered(columns):
        if max(map(int, columns)) > len(first):
            raise ValueError(f"has {len(first)} columns, and no column {max(map(int, columns))}")
        return [int(column) - 1 for column in columns]
    held = [name.strip() for name in names or []]
    for column in columns:
        if held.count(column) != 1:
            many = "several columns" if column in held else "no column"
            raise ValueError(f"has {many} {column!r}: it has {', '.join(held) or 'no names'}")
    return [held.index(column) for column in columns]


def _numbered(columns: list[str]) -> bool:
    return all(column.isdecimal() and int(column) > 0 for column in columns)


def _numbers(row: list[str], line: int, places: list[int]) -> list[float]:
    try:
        return [_number(row[place]) for place in places]
    except ValueError:
        [place, *_] = [place for place in places if not _is_number(row[place])]
        where = f"line {line}, column {place + 1}"
        raise ValueError(f"holds {row[place]!r} in {where}, which is no number (--columns chooses)") from None


def _number(cell: str) -> float:
    cell = cell.strip()
    if cell.lower() in _MISSING:
        return float("nan")
    if "_" in cell:  # which Python alone reads
        raise ValueError(cell)
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True
