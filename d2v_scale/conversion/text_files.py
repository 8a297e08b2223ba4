"""Documents in files: plain text, JSON and JSONL, tables (.tsv as GLUE's, .csv), with labels and pairs where there are
any. The one reader of make_shards, of the training of tokenizers and of fine-tuning's tables."""

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from d2v_scale.conversion.tables import Columns, rows
from d2v_scale.errors import DataError
from d2v_scale.modalities.text.decoder import require_text
from d2v_scale.shards.shard_set import INDEX_SUFFIX

_PLAIN = ("txt", "md", "rst")
RECORDS = ("jsonl", "ndjson", "json")
TABLES = ("tsv", "csv")
_COMPRESSED: dict[str, Callable[..., Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
UNREADABLE = (OSError, EOFError, UnicodeError, lzma.LZMAError, zlib.error)
EXTENSIONS = (*_PLAIN, *RECORDS, *TABLES)
"""Each may be followed by .gz, .bz2 or .xz."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, the longer ones before those that they begin with."""
JSON_KEYS = Columns("text", "text2", "label")
"""The keys of JSON records, unless others are named."""


@dataclass
class Document:
    """One text, or a pair of texts."""

    text: str
    label: str | None = None
    second: str | None = None
    place: str = ""
    """Where it is from: file, and line or number where the file holds several."""
    fault: str | None = None
    """Why it cannot be used; null: it can."""

    @property
    def texts(self) -> list[str]:
        """The one, or both."""
        return [self.text] if self.second is None else [self.text, self.second]


@dataclass(kw_only=True)
class Reading:
    """How files are read."""

    split: str = "file"
    """A document of a plain text file is the `file`, a `paragraph` or a `line` of it."""
    columns: Columns | None = None
    """Of tables, and the keys of JSON; null: `JSON_KEYS`, and tables are refused."""
    encoding: str | None = None
    """Of files without a byte order mark; null: UTF-8."""

    def __post_init__(self) -> None:
        try:
            b"a".decode(self.encoding or "utf-8")
        except UnicodeError:  # of two bytes a character
            pass
        except (LookupError, ValueError):
            raise DataError(f"--encoding {self.encoding!r} is not known.", "Write one as latin-1, cp1252.") from None


def kind_of(path: Path) -> str:
    """The extension that says what a file holds: `jsonl` of `a.jsonl.gz`. Lower case."""
    if path.name.endswith(INDEX_SUFFIX):  # lies where shards were written, which may be among the texts
        return INDEX_SUFFIX[1:]
    suffixes = [suffix[1:].lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def documents(files: list[Path], reading: Reading) -> Iterator[Document]:
    """All documents. What is none, or cannot be used, is one with a `fault`: to be named, counted and left out.

    Raises DataError for a table without the columns, or when they are not given.
    """
    for path in files:
        found = 0
        try:
            for document in _documents_of(path, reading):
                found += 1
                yield _checked(document)
        except UNREADABLE as error:
            after = f" after {found} documents" if found else ""
            yield Document("", place=str(path), fault=f"cannot be read{after}: {error}")
        else:
            if not found:
                yield Document("", place=str(path), fault="holds no document")


def checked(content: bytes, place: str) -> Document:
    """A document of a shard."""
    return _checked(Document(content.decode("utf-8", errors="surrogateescape"), place=place))


def _checked(document: Document) -> Document:
    if document.fault is None:
        try:
            require_text(document.text)
        except ValueError as error:
            document.fault = str(error)
        for what, value in (("second text", document.second), ("label", document.label)):
            try:
                require_text("a" if value is None else value)
            except ValueError as error:
                document.fault = f"its {what} {error}"
    return document


def _documents_of(path: Path, reading: Reading) -> Iterator[Document]:
    kind = kind_of(path)
    with opened(path, reading.encoding, newline="" if kind in TABLES else None) as stream:
        if kind in TABLES:
            for row in rows(path, stream, reading.columns, quoted=kind == "csv"):
                place = f"{path}:{row.line}"
                yield Document(row.first, (row.label or "").strip() or None, row.second, place, row.fault)
        elif kind in RECORDS:
            yield from _records(path, stream, reading.columns)
        elif reading.split == "file":
            yield Document(stream.read(), place=str(path))
        elif reading.split == "line":
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield Document(line, place=f"{path}:{number}")
        else:
            numbered = enumerate(stream, start=1)
            for blank, lines in itertools.groupby(numbered, lambda line: not line[1].strip()):
                if not blank:
                    paragraph = list(lines)
                    yield Document("".join(line for _, line in paragraph), place=f"{path}:{paragraph[0][0]}")


def opened(path: Path, encoding: str | None, newline: str | None) -> TextIO:
    """A file as text. Bytes that are not of its encoding are kept as lone surrogates, which `require_text` refuses."""
    open_bytes = _COMPRESSED.get(path.suffix[1:].lower(), open)
    with open_bytes(path, "rb") as stream:
        begins = stream.read(4)
    encoding = encoding_of(begins, encoding)
    # These two cannot go on behind what they cannot decode.
    errors = "strict" if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")) else "surrogateescape"
    return io.TextIOWrapper(open_bytes(path, "rb"), encoding=encoding, errors=errors, newline=newline)


def encoding_of(begins: bytes, otherwise: str | None = None) -> str:
    """What a byte order mark in the first four bytes of a file says; without one `otherwise`, or UTF-8."""
    return next((name for mark, name in _MARKS.items() if begins.startswith(mark)), otherwise or "utf-8")


def _records(path: Path, stream: TextIO, columns: Columns | None) -> Iterator[Document]:
    """Objects, one a line; or a file that is one list of them, or objects laid out over several lines."""
    keys = columns or JSON_KEYS
    begins = next((line.strip() for line in stream if line.strip()), "")
    stream.seek(0)
    if begins.startswith("[") or begins == "{":
        try:
            for number, record in enumerate(_values(stream.read())):
                yield _of_record(record, keys, columns is not None, f"{path}[{number}]")
        except (ValueError, RecursionError) as error:
            yield Document("", place=str(path), fault=f"is no JSON: {error}")
        return
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Document("", place=place, fault=f"is no line of JSON: {error}")
            continue
        yield _of_record(record, keys, columns is not None, place)


def _values(text: str) -> Iterator[Any]:
    """The members of a list, or values one behind the other."""
    decoder, end = json.JSONDecoder(), len(text.rstrip())
    at = len(text) - len(text.lstrip())
    while at < end:
        value, at = decoder.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]
        while at < end and text[at].isspace():
            at += 1


def _of_record(record: Any, keys: Columns, named: bool, place: str) -> Document:
    """`named`: the keys were asked for, so that a second text has to be there."""
    if not isinstance(record, dict):
        return Document("", place=place, fault=f"is a JSON {_kind(record)}, no object")
    texts: list[str | None] = []
    for key in (keys.first, keys.second):
        value = record.get(key) if key is not None else None
        required = key == keys.first or (named and key is not None)
        if not isinstance(value, str) and (required or value is not None):
            what = f"{key!r} is a JSON {_kind(value)}, no text" if key in record else f"has no {key!r}"
            return Document("", place=place, fault=what)
        texts.append(value)
    label = record.get(keys.label) if keys.label is not None else None
    if isinstance(label, (dict, list)):
        return Document("", place=place, fault=f"{keys.label!r} is a JSON {_kind(label)}, no label")
    return Document(texts[0] or "", None if label is None else str(label).strip(), texts[1], place)


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return kinds.get(type(value), "number")


def transcripts(path: Path, encoding: str | None = None) -> dict[str, str]:
    """Texts by file, from lines `path below the recordings, without ending`, a tab or a space, `text`. Where a line has
    a tab, paths may have spaces. LibriSpeech's `.trans.txt` files, joined, are of this kind. Raises DataError."""
    texts: dict[str, str] = {}
    try:
        with opened(path, encoding, newline=None) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                name, _, text = line.partition("\t") if "\t" in line else line.strip().partition(" ")
                name, text = name.strip(), text.strip()
                require_text(line)
                if texts.get(name, text) != text:
                    raise ValueError(f"line {number}: {name!r} has another text above")
                texts[name] = text
    except (ValueError, *UNREADABLE) as error:
        raise DataError(f"The transcripts {path} cannot be read: {error}.", "See --encoding.") from error
    return texts


def transcripts_below(path: Path, encoding: str | None = None) -> dict[str, str]:
    """As `transcripts`, of a file; or of a folder whose `*.trans.txt` lie beside the recordings, as LibriSpeech's do.
    Raises DataError."""
    if not path.is_dir():
        return transcripts(path, encoding)
    by_path: dict[str, str] = {}
    by_name: dict[str, set[str]] = {}
    for file in sorted(path.rglob("*.trans.txt")):
        for name, text in transcripts(file, encoding).items():
            by_path[(file.parent / name).relative_to(path).as_posix()] = text
            by_name.setdefault(name, set()).add(text)
    if not by_path:
        raise DataError(f"No file below {path} ends in .trans.txt, or all are empty.", "Name the file of transcripts.")
    return {name: texts.pop() for name, texts in by_name.items() if len(texts) == 1} | by_path
