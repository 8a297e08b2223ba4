"""What columns of tables are usually called, and what a table's first lines say of it."""

import csv
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from d2v_scale.conversion import text_files
from d2v_scale.conversion.array_tables import TableReading, read_table
from d2v_scale.errors import DataError

USUAL: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "image_path", "picture", "photo"),
    "audio": ("audio", "audio_path", "audio_filepath", "wav", "speech", "recording"),
    "array": ("array", "signal", "series", "values", "sensor"),
    "text": ("text", "sentence", "document", "content", "caption", "transcription", "transcript", "sentence1"),
    "label": ("label", "labels", "class", "category", "target"),
}
"""By part of a sample: names of its column, the more usual first. `path` and `file_name` may be anything's."""
PAIRS_OF_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text2"),
)
_LOOKED_AT = 50
_BEGINNING = 1 << 16


def usual_column(part: str, names: Iterable[str]) -> str | None:
    """The column among `names` that is called as `part` usually is."""
    by_lower = {name.strip().lower(): name for name in reversed(list(names))}
    return next((by_lower[usual] for usual in USUAL[part] if usual in by_lower), None)


def text_columns(names: Sequence[str]) -> list[str] | None:
    """The columns of texts, one or two, and of a label if there is one; None: nobody could tell."""
    pair = next((pair for pair in PAIRS_OF_TEXTS if set(pair) <= set(names)), None)
    text = usual_column("text", names)
    if pair is None and text is None:
        return None
    label = usual_column("label", names)
    return [*(pair or [str(text)]), *([label] if label is not None else [])]


def first_rows(path: Path) -> list[list[str]]:
    """The first lines of a .csv or .tsv, divided. Raises DataError where it cannot be read."""
    try:
        with text_files.opened(path, None, newline="") as stream:
            lines = list(itertools.islice(stream, _LOOKED_AT))
        if text_files.kind_of(path) == "tsv":
            return [row for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
        delimiter = max(",;\t|", key=lambda one: len(next(csv.reader(lines[:1], delimiter=one), [])))
        return [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except (*text_files.UNREADABLE, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def holds_numbers(path: Path) -> bool:
    """Whether a table is one of numbers, an array."""
    try:
        with path.open("rb") as stream:
            beginning = stream.read(_BEGINNING)
        whole = beginning if len(beginning) < _BEGINNING else beginning[: beginning.rfind(b"\n") + 1]
        read_table(whole, TableReading())
    except (OSError, ValueError):
        return False
    return True


def columns_without_names(rows: list[list[str]]) -> list[str] | None:
    """`TEXT` and perhaps `LABEL`, numbers from 1, of a table whose first line is a row like the others: the column of
    the longest texts, and one of few different whole numbers. None where the first line may be names."""
    width = len(rows[0])
    same = [row for row in rows if len(row) == width]
    if len(same) < len(rows) - 1 or not any(cell.strip().lstrip("-").isdecimal() for cell in rows[0]):
        return None
    lengths = np.array([[len(cell) for cell in row] for row in same]).mean(axis=0)
    text = int(lengths.argmax())
    numbered = [k for k in range(width) if all(row[k].strip().lstrip("-").isdecimal() for row in same)]
    few = [k for k in numbered if len({row[k] for row in same}) <= max(2, len(same) // 2)]
    if text in numbered:
        return None
    return [str(text + 1), *([str(few[0] + 1)] if len(few) == 1 else [])]


def first_record(path: Path) -> dict[str, object]:
    """The first object of a file of JSON; {} where it has none."""
    try:
        with text_files.opened(path, None, newline=None) as stream:
            begins = next((line.strip() for line in stream if line.strip()), "")
            if begins.startswith("[") or begins == "{":
                stream.seek(0)
                value = json.loads(stream.read())
                value = value[0] if isinstance(value, list) and value else value
            else:
                value = json.loads(begins)
    except (*text_files.UNREADABLE, ValueError, RecursionError):
        return {}  # said when it is read
    return value if isinstance(value, dict) else {}
