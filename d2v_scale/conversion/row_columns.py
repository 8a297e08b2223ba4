"""Which columns of a table of rows are the parts of a sample: by type, by what `datasets` says of them, by name."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2v_scale.conversion.column_names import PAIRS_OF_TEXTS, USUAL
from d2v_scale.conversion.row_files import features_of, rows_of, schema_of
from d2v_scale.errors import DataError

PARTS = ("image", "audio", "array", "text")
_LOOKED_AT = 20
_BEGINNINGS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"ID3": "mp3",
    b"\xff\xfb": "mp3",
    b"\xff\xf3": "mp3",
    b"FORM": "aiff",
    b".snd": "au",
}


@dataclass
class RowColumns:
    """The columns that are read."""

    image: str | None = None
    audio: str | None = None
    array: str | None = None
    text: str | None = None
    second: str | None = None
    """Of a pair of texts."""
    label: str | None = None
    names: list[str] | None = None
    """Of the classes, where the labels are their numbers."""
    is_score: bool = False
    """Labels are numbers, and not classes."""
    array_type: str = "float32"
    not_read: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """Of `PARTS`, those that a sample has."""
        return [part for part in PARTS if getattr(self, part) is not None]

    @property
    def read(self) -> list[str]:
        """The columns that are read."""
        columns = [getattr(self, part) for part in self.parts]
        return [*columns, *(column for column in (self.second, self.label) if column is not None)]

    def __str__(self) -> str:
        said = [f"{part} in {getattr(self, part)!r}" for part in self.parts]
        said += [f"second text in {self.second!r}"] if self.second else []
        said += [f"{'score' if self.is_score else 'label'} in {self.label!r}"] if self.label else []
        return ", ".join(said) + (f"; not read: {', '.join(self.not_read)}" if self.not_read else "")


def find_columns(path: Path, given: dict[str, str]) -> RowColumns:
    """The columns of a file's table. `given`: those that the user names, by part. Raises DataError where a named one is
    not there, where several could be meant, and where none is any part of a sample."""
    schema = schema_of(path)
    if unknown := [column for column in given.values() if column not in schema.names]:
        raise DataError(f"{path} has no column {unknown[0]!r}.", f"It has: {', '.join(schema.names)}.")
    features = features_of(schema)
    kinds = {column.name: _kind(path, column, features.get(column.name, {})) for column in schema}
    found = RowColumns()
    said, taken = set(given), set(given.values())
    for part in PARTS if not said & set(PARTS) else ():
        of_kind = [name for name, kind in kinds.items() if kind == part and name not in taken]
        chosen = _texts(of_kind, kinds) if part == "text" else _one(part, of_kind, path)
        if chosen is not None:
            given = given | {part: chosen}
    for part, column in given.items():
        setattr(found, part, column)
    if not found.parts:
        held = ", ".join(f"{name} ({schema.field(name).type})"[:60] for name in schema.names)
        raise DataError(
            f"No column of {path} is an image, a recording, an array or a text that is called as texts usually are; it "
            f"has: {held}.",
            "Name its columns, as --text NAME --label NAME.",
        )
    if found.parts == ["text"] and found.second is None and "text" not in said:
        found.second = next((b for a, b in PAIRS_OF_TEXTS if a == found.text and kinds.get(b) == "text"), None)
    if found.label is None:
        labels = [name for name, kind in kinds.items() if kind == "label" and name not in found.read]
        found.label = _one("label", labels, path)
    if found.label is not None:
        names = features.get(found.label, {}).get("names")
        found.names = [str(name) for name in names] if isinstance(names, list) else None
        found.is_score = _is_floating(schema.field(found.label).type)
    if found.array is not None:
        found.array_type = _numbers_in(schema.field(found.array).type) or found.array_type
    found.not_read = [name for name in schema.names if name not in found.read]
    return found


def _one(part: str, columns: list[str], path: Path) -> str | None:
    if len(columns) < 2:
        return columns[0] if columns else None
    by_lower = {name.lower(): name for name in reversed(columns)}
    usual = next((by_lower[name] for name in USUAL[part] if name in by_lower), None)
    if usual is None:
        raise DataError(
            f"Several columns of {path} may be the {part}: {', '.join(columns)}.", f"Name one with --{part} NAME."
        )
    return usual


def _texts(columns: list[str], kinds: dict[str, str | None]) -> str | None:
    """The first column of texts: by its name, or the only one where samples have no other part."""
    pair = next((a for a, b in PAIRS_OF_TEXTS if a in columns and b in columns), None)
    by_lower = {name.lower(): name for name in reversed(columns)}
    usual = pair or next((by_lower[name] for name in USUAL["text"] if name in by_lower), None)
    if usual is None and len(columns) == 1 and not set(kinds.values()) & {"image", "audio", "array"}:
        return columns[0]
    return usual


def _kind(path: Path, column: Any, feature: dict[str, Any]) -> str | None:
    """image, audio, array, text or label; None: none of these that could be told."""
    import pyarrow.types as types  # type: ignore[import-untyped]

    kind, name = column.type, column.name.lower()
    if feature.get("_type") in ("Image", "Audio"):
        return str(feature["_type"]).lower()
    if feature.get("_type") == "ClassLabel":
        return "label"
    if _holds_bytes(kind):
        return _kind_of_bytes(rows_of(path, [column.name], 0, _LOOKED_AT), column.name)
    if (number := _numbers_in(kind)) is not None:
        return "array" if number.startswith("float") or name in USUAL["array"] else None
    is_text = types.is_string(kind) or types.is_large_string(kind)
    if name in USUAL["label"] or (name == "score" and _is_floating(kind)):
        is_number = types.is_integer(kind) or types.is_boolean(kind) or _is_floating(kind)
        return "label" if is_text or is_number else None
    return "text" if is_text else None


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_floating(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_floating(kind))


def _numbers_in(kind: Any) -> str | None:
    """The type of the numbers in lists, perhaps in lists, as NumPy calls it; None: it is no list of numbers."""
    import pyarrow
    import pyarrow.types as types

    depth = 0
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    is_number = types.is_floating(kind) or types.is_integer(kind)
    return str(kind.to_pandas_dtype().__name__) if depth and is_number else None


def _kind_of_bytes(rows: Iterable[dict[str, Any]], column: str) -> str | None:
    for row in rows:
        content, path = bytes_of(row[column])
        extension = extension_of(content) if content else Path(path).suffix[1:].lower()
        if extension:
            from d2v_scale.modalities.speech import decoder as speech
            from d2v_scale.modalities.vision import decoder as vision

            return "image" if extension in vision.EXTENSIONS else "audio" if extension in speech.EXTENSIONS else None
    return None


def bytes_of(value: Any) -> tuple[bytes | None, str]:
    """The content of a cell, and the path beside it or instead of it."""
    if isinstance(value, dict):
        return value.get("bytes"), str(value.get("path") or "")
    return value, ""


def extension_of(content: bytes) -> str:
    """What the beginning of a file says of its format; empty: nothing."""
    if content[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav"}.get(content[8:12], "")
    return next((extension for begins, extension in _BEGINNINGS.items() if content.startswith(begins)), "")
