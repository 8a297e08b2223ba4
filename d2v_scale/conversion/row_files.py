"""Rows of Parquet and Arrow files, and of the folders that Hugging Face `datasets` makes of them."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v_scale.conversion.file_kinds import ROW_TABLES
from d2v_scale.conversion.folders import FoundFiles, find_files
from d2v_scale.errors import DataError

_BATCH = 64
"""Rows of a Parquet file in memory at once."""
_OF_SEVERAL = re.compile(r"(.*-)(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class RowFile:
    """A file, and how many rows it has."""

    path: Path
    rows: int


def row_files(source: Path, match: str | None) -> tuple[FoundFiles, list[RowFile]]:
    """The files of one table. Raises DataError where one is missing or cannot be read, where they have different
    columns, and for several splits in one folder."""
    if (source / "dataset_dict.json").is_file():
        splits = _json(source / "dataset_dict.json").get("splits", [])
        raise DataError(
            f"{source} has the splits {', '.join(map(str, splits))}.",
            f"Give one, as {source / str(next(iter(splits), 'train'))}, each with a --prefix of its own.",
        )
    found = find_files(source, ROW_TABLES, match)
    _leave_out_caches(found)
    _tell_missing(found.files)
    columns: tuple[Path, set[str]] | None = None
    counted = []
    for path in found.files:
        try:
            schema, rows = _schema_and_rows(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are of these
            raise DataError(f"{path} cannot be read: {error}.", "Restore it, or leave it out with --match.") from error
        if columns is not None and set(schema.names) != columns[1]:
            raise DataError(
                f"{path} and {columns[0]} have different columns: {', '.join(schema.names)[:200]} and "
                f"{', '.join(sorted(columns[1]))[:200]}.",
                "Choose one table with --match.",
            )
        columns = columns or (path, set(schema.names))
        counted.append(RowFile(path, rows))
    return found, counted


def schema_of(path: Path) -> Any:
    """The file's pyarrow.Schema."""
    return _schema_and_rows(path)[0]


def features_of(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face `datasets` says of each column (`_type`: Image, Audio, ClassLabel, ...); {} without it."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: one for name, one in features.items() if isinstance(one, dict)} if isinstance(features, dict) else {}


def rows_of(path: Path, columns: list[str], start: int = 0, count: int | None = None) -> Iterator[dict[str, Any]]:
    """So many rows from the `start`-th on, by column as Python has them. Raises OSError and ValueError."""
    passed, end = 0, float("inf") if count is None else start + count
    for batch in _batches(path, columns, start):
        if isinstance(batch, int):  # rows that need not be read
            passed += batch
            continue
        low, high = max(0, start - passed), min(batch.num_rows, end - passed)
        if low < high:
            yield from batch.slice(low, int(high - low)).to_pylist()
        passed += batch.num_rows
        if passed >= end:
            return


def _batches(path: Path, columns: list[str], start: int) -> Iterator[Any]:
    """Record batches; instead of whole groups of rows before `start` their number."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]

        with pyarrow.parquet.ParquetFile(path) as file:
            passed = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if passed + rows <= start:
                    yield rows
                else:
                    yield from file.iter_batches(_BATCH, [group], columns)
                passed += rows
        return
    reader, count = _open_arrow(path)
    batches = iter(reader) if count is None else (reader.get_batch(k) for k in range(count))
    for batch in batches:
        yield batch.select(columns)


def _schema_and_rows(path: Path) -> tuple[Any, int]:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata.num_rows
    reader, count = _open_arrow(path)
    batches = iter(reader) if count is None else (reader.get_batch(k) for k in range(count))
    return reader.schema, sum(batch.num_rows for batch in batches)


def _open_arrow(path: Path) -> tuple[Any, int | None]:
    """A reader, and how many batches it has: None for a stream, which is what `datasets` writes."""
    import pyarrow  # type: ignore[import-untyped]

    mapped = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(mapped), None
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        file = pyarrow.ipc.open_file(mapped)
        return file, file.num_record_batches


def _leave_out_caches(found: FoundFiles) -> None:
    """Where `datasets` has written which files are the data, leave out the others. Raises DataError for one that is not
    there."""
    for folder in sorted({path.parent for path in found.files}):
        if not (folder / "state.json").is_file():
            continue
        named = [folder / str(one.get("filename")) for one in _json(folder / "state.json").get("_data_files", [])]
        if absent := [path for path in named if not path.is_file()]:
            raise DataError(f"{folder / 'state.json'} names {absent[0].name}, which is not there.", "Restore it.")
        others = [path for path in found.files if path.parent == folder and path not in named]
        found.files = [path for path in found.files if path not in others]
        if others:
            found.other[f"{others[0].suffix} that state.json does not name"] = len(others)


def _tell_missing(files: list[Path]) -> None:
    """Say where files are numbered as parts of a whole (`train-00000-of-00004`), and some are not there."""
    wholes: dict[tuple[Path, str, int], int] = {}
    for path in files:
        if matched := _OF_SEVERAL.fullmatch(path.stem):
            key = (path.parent, matched[1], int(matched[3]))
            wholes[key] = wholes.get(key, 0) + 1
    for (folder, name, count), there in wholes.items():
        if there < count:
            print(f"{folder}/{name}*: {there} of {count} files are there", file=sys.stderr)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Restore it, or remove it.") from error
    return value if isinstance(value, dict) else {}
