"""`d2v shards arrays`: folders of .npy, .npz and tables of numbers."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from d2v_scale.conversion.array_layouts import first_layout
from d2v_scale.conversion.array_members import EXTENSIONS, ArrayReading, Layout
from d2v_scale.conversion.array_tables import TableReading
from d2v_scale.conversion.command import Command, file_items
from d2v_scale.conversion.converters import Conversion, Item
from d2v_scale.conversion.folders import FoundFiles, find_files, last_extension
from d2v_scale.data.config import SourceConfig
from d2v_scale.errors import DataError
from d2v_scale.shards.shard_set import INDEX_SUFFIX, find_shards

_LOOKED_INTO = 100
"""Files that decide what channels and axes a set has."""


class Arrays(Command):
    """Files of arrays, one sample each."""

    content = "array"

    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        found = find_files(arguments.source, EXTENSIONS, arguments.match)
        table = TableReading(_columns(arguments.columns), _delimiter(arguments.delimiter))
        table.header = None if arguments.header is None else arguments.header == "yes"
        reading = ArrayReading(arguments.key, table)
        reading.layout = usual_layout(found.files, reading)
        _require_layout_of_out(arguments.out, arguments.prefix, reading.layout)
        if reading.layout is not None:
            print(f"arrays of {reading.layout}", file=sys.stderr)
        conversion.arrays = reading
        return found, *file_items(found, arguments.label, known)


def usual_layout(files: list[Path], reading: ArrayReading) -> Layout | None:
    """What most of the files have, of which up to 100 are looked into, the same ones each time; of equally many the one
    that comes first. None where none of them can be read."""
    counts: Counter[Layout] = Counter()
    # At random: every third file may be of another kind.
    for place in sorted(np.random.default_rng(0).permutation(len(files))[:_LOOKED_INTO]):
        try:
            content = files[place].read_bytes()
            counts[Layout.of(reading.shape(content, last_extension(files[place])))] += 1
        except (OSError, ValueError):  # named where it is converted
            continue
    return counts.most_common(1)[0][0] if counts else None


def _require_layout_of_out(out: Path, prefix: str, layout: Layout | None) -> None:
    """Raises DataError where the other sets in OUT have another one: a model that was trained on the training split
    could not read its test split."""
    for path in sorted(out.glob(f"*{INDEX_SUFFIX}")) if layout is not None else []:
        shards = find_shards(SourceConfig(shards=str(path)))
        if path.name == f"{prefix}{INDEX_SUFFIX}" or shards.index is None or shards.index.content != "array":
            continue
        held = first_layout(shards)
        if held not in (None, layout):
            raise DataError(f"The arrays below SRC have {layout}, those of {path} have {held}.", "Give another OUT.")


def _columns(text: str | None) -> list[str] | None:
    columns = None if text is None else text.split(",")
    if columns is not None and not all(columns):
        raise DataError(f"--columns {text!r} names an empty column.", "Write NAME,NAME or numbers from 1 on.")
    return columns


def _delimiter(text: str | None) -> str | None:
    text = "\t" if text in ("\\t", "tab") else text
    if text is not None and (len(text) != 1 or text in '\r\n"'):
        raise DataError(f"--delimiter {text!r} is not one character that could part columns.", "Give one, or `tab`.")
    return text
