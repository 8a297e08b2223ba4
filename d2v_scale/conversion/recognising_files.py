"""What a folder or file of raw data is, where nobody says it: the command of `d2v shards` that converts it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2v_scale.conversion import column_names, text_files
from d2v_scale.conversion.file_kinds import OVERRIDES, Files, files_below, kind_of, splits
from d2v_scale.errors import DataError

_STRONG = {"image": "images", "audio": "audio", "array": "arrays", "rows": "dataset"}
"""Kinds that no converter of another kind reads, and the command of each; the rest is left out beside them."""
_WORDS = {"image": "images", "audio": "recordings", "array": "arrays", "rows": "tables of rows (Parquet, Arrow)"}
_WEAK = ("table", "record", "text")
"""Read by the converter of texts; tables also by that of arrays. Left out beside the others."""
_OF_UTTERANCE = re.compile(r"(?:.*/)?(\w+)/(\w+)/\1[-_]\2[-_]\w+\.\w+")
"""A recording of a LibriSpeech-like tree: SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac."""
_NAMED = 3


@dataclass(frozen=True)
class Recognised:
    """One set of shards to be made."""

    command: str
    """Of `d2v shards`."""
    source: Path
    says: str
    """For people: what it is."""
    options: tuple[str, ...] = ()
    """Of the command, as they are typed."""

    def arguments(self, out: str, more: Sequence[str] = ()) -> list[str]:
        """Of `d2v shards`; `more` options count for more than those that were recognised."""
        return [self.command, str(self.source), out, *self.options, *more]

    def typed(self, out: str, more: Sequence[str] = ()) -> str:
        """The command for people."""
        return shlex.join(["d2v", "shards", *self.arguments(out, more)])


def recognise(source: Path) -> list[Recognised]:
    """What is to be converted of `source`: a set, or one for each of its splits, that for training first.

    Raises DataError, in one sentence with the remedy, where nobody could tell: mixed contents, a folder that cannot be
    read, a table without the columns that are usual.
    """
    found = files_below(source)
    kinds = [kind for kind in (*_STRONG, *_WEAK) if found.count(kind)]
    if not kinds:
        raise DataError(*_nothing(found))
    strong = [kind for kind in kinds if kind in _STRONG]
    if (pairs := _table_of_pairs(found, strong)) is not None:
        return [pairs]
    if len(strong or kinds) > 1:
        raise DataError(*_mixed(found, strong or kinds))
    [kind] = strong or kinds
    parts = splits(found, [kind])
    if not parts:
        return [_recognised(found, kind)]
    made = []
    for name, part in parts.items():
        if (source / name).is_dir():
            part = Files(source / name, part.by_kind)
            more: tuple[str, ...] = ()
        else:
            more = ("--match", rf"(^|/){name}(\b|[^A-Za-z])")
        part.by_kind["transcript"] = [p for p in found.by_kind.get("transcript", ()) if p.is_relative_to(part.root)]
        one = _recognised(part, kind)
        options = (*one.options, *more, "--prefix", name)
        made.append(Recognised(one.command, one.source, f"{name}: {one.says}", options))
    if len({one.command for one in made}) > 1:
        raise DataError(f"The parts of {source} hold different things: {'; '.join(one.says for one in made)}.", _SAY)
    return made


_SAY = f"Say what it is, with one of {OVERRIDES}."


def _recognised(found: Files, kind: str) -> Recognised:
    files, root = found.by_kind.get(kind, []), found.root
    if kind == "rows":
        return Recognised("dataset", root, f"{_many(len(files), 'file')} of rows ({_extensions(files)})")
    if kind == "table" and all(map(column_names.holds_numbers, files[:_NAMED])):
        return Recognised("arrays", root, f"{_many(len(files), 'table')} of numbers, an array each")
    if kind in _WEAK:
        return _texts(found, kind)
    folders = len({path.parent for path in files} - {root})
    in_folders = f" in {_many(folders, 'folder')}, whose names are the labels" if folders > 1 else ""
    said = f"{len(files):,} {_WORDS[kind]}{in_folders}"
    if kind == "audio" and found.count("transcript"):
        number = found.count("transcript")
        said = f"{len(files):,} recordings with {_many(number, 'file')} of transcripts (*.trans.txt)"
        return Recognised("audio", root, said, ("--transcripts", str(root), "--label", "none"))
    if kind == "audio" and files and _OF_UTTERANCE.fullmatch(files[0].relative_to(root.parent).as_posix()):
        return Recognised("audio", root, f"{len(files):,} recordings by speaker and chapter", ("--label", "none"))
    return Recognised(_STRONG[kind], root, said)


def _texts(found: Files, kind: str) -> Recognised:
    """Documents, or tables and JSON of texts, whose columns are found in the first of them."""
    files = found.by_kind[kind]
    said = _many(len(files), {"table": "table", "record": "file of JSON", "text": "file of text"}[kind])
    columns = None
    if kind == "table":
        columns = _columns_of_table(files[0], found.root)
    elif kind == "record":
        columns = _keys_of_records(files[0], found.root)
    options: tuple[str, ...] = ()
    if kind != "text" and found.root.is_dir() and found.count("other"):  # a README is no document of it
        options = ("--match", _ending(files))
    if columns is None:
        return Recognised("text", found.root, said, options)
    meant = ["text", "label"] if len(columns) < 3 else ["text", "second text", "label"]
    named = ", ".join(f"{what} in {column!r}" for what, column in zip(meant, columns, strict=False))
    return Recognised("text", found.root, f"{said}, {named}", ("--columns", ",".join(columns), *options))


def _ending(files: list[Path]) -> str:
    """A pattern of the names that end as these do."""
    return rf"\.({'|'.join(sorted({text_files.kind_of(path) for path in files}))})(\.\w+)?$"


def _columns_of_table(table: Path, source: Path) -> list[str]:
    rows = column_names.first_rows(table)
    if not rows:
        raise DataError(f"{table} is empty.", "Remove it.")
    columns = column_names.text_columns(rows[0]) or column_names.columns_without_names(rows)
    if columns is None:
        raise DataError(
            f"No column of the table {table} is called as texts usually are; it has: {', '.join(rows[0])[:300]}.",
            f"Name its columns: d2v shards text {shlex.quote(str(source))} OUT --columns TEXT,LABEL (numbers: d2v "
            "shards arrays; of files: d2v shards pairs).",
        )
    return columns


def _keys_of_records(path: Path, source: Path) -> list[str] | None:
    record = column_names.first_record(path)
    if not record or isinstance(record.get("text"), str):
        return None  # as `d2v shards text` reads them by itself; what is wrong is named there
    columns = column_names.text_columns([key for key in record if isinstance(record[key], str | int | bool)])
    if columns is None:
        raise DataError(
            f"No key of the objects in {path} is called as texts usually are; they have: {', '.join(record)[:300]}.",
            f"Name them: d2v shards text {shlex.quote(str(source))} OUT --columns TEXT,LABEL.",
        )
    return columns


def _table_of_pairs(found: Files, strong: list[str]) -> Recognised | None:
    """The table of SRC whose rows name files that go together; None: there is none."""
    tables = [path for path in found.by_kind.get("table", ()) if path.parent == found.root or path == found.root]
    if "rows" in strong or len(tables) != 1 or text_files.kind_of(tables[0]) not in text_files.TABLES:
        return None
    [table] = tables
    rows = column_names.first_rows(table)
    columns = {part: column_names.usual_column(part, rows[0]) for part in column_names.USUAL} if rows else {}
    for part in ("image", "audio"):  # `file_name` and `path` are what lies there
        usual = next((name for name in rows[0] if name.strip().lower() in _FILES), None) if rows else None
        if columns.get(part) is None and strong == [part]:
            columns[part] = usual
    held = {part: column for part, column in columns.items() if column is not None}
    parts = [part for part in held if part != "label"]
    if len(parts) < 2 or len(rows) < 2 or not _are_files(table, rows, [held[part] for part in parts if part != "text"]):
        return None
    options = [word for part, column in held.items() if part != column for word in (f"--{part}", column)]
    return Recognised("pairs", table, f"a table of pairs: {', '.join(held)}", tuple(options))


_FILES = ("file_name", "filename", "path", "file")


def _are_files(table: Path, rows: list[list[str]], columns: list[str]) -> bool:
    """Whether the first row names files in these columns."""
    places = [rows[0].index(column) for column in columns]
    return all(place < len(rows[1]) and (table.parent / rows[1][place].strip()).is_file() for place in places)


def _mixed(found: Files, kinds: list[str]) -> tuple[str, str]:
    words = _WORDS | {"table": "tables", "record": "files of JSON", "text": "texts"}
    shown = " and ".join(f"{found.count(kind):,} {words[kind]} ({found.by_kind[kind][0]}, ...)" for kind in kinds)
    source = shlex.quote(str(found.root))
    ways = []
    for kind in kinds:
        chosen = f" --match {shlex.quote(_ending(found.by_kind[kind]))}" if kind in _WEAK else ""
        ways.append(f"d2v shards {_STRONG.get(kind, 'text')} {source} OUT{chosen}")
    return f"{found.root} holds {shown}, and one set of shards is of one content.", f"Say which: {' or '.join(ways)}."


def _nothing(found: Files) -> tuple[str, str]:
    if found.count("shard"):
        return (
            f"{found.root} holds {_many(found.count('shard'), 'tar')}, which may be shards already.",
            "Make an index with `d2v index`, and train on them with --data.",
        )
    if found.count("archive"):
        return f"{found.root} holds {_many(found.count('archive'), 'archive')}.", "Unpack first."
    others = sorted({path.suffix or path.name for path in found.by_kind.get("other", ())})[:_NAMED]
    held = f"nothing that can be recognised ({', '.join(others)})" if others else "no file"
    return f"{found.root} holds {held}.", f"It takes images, recordings, texts, tables and arrays: {OVERRIDES}."


def _extensions(files: list[Path]) -> str:
    return ", ".join(sorted({f".{path.suffix[1:].lower()}" for path in files}))


def _many(count: int, what: str) -> str:
    first, _, rest = what.partition(" ")
    return f"{count:,} {first}{'' if count == 1 else 's'} {rest}".rstrip()


def is_raw(path: str) -> bool:
    """Whether `--data` names something that is there and holds no shards."""
    source = Path(path)
    if not source.exists() or path.endswith("index.json"):
        return False
    return not any(source.glob("*.tar")) if source.is_dir() else kind_of(source) not in ("shard", "other")
