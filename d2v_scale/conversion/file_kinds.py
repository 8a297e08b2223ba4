"""What the files below a folder are, by their names: kinds of content, and splits for training and testing."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from d2v_scale.conversion import text_files
from d2v_scale.conversion.folders import walk
from d2v_scale.errors import DataError
from d2v_scale.modalities.array import members as arrays
from d2v_scale.modalities.speech import decoder as speech
from d2v_scale.modalities.vision import decoder as vision

OVERRIDES = "d2v shards images|audio|text|arrays|pairs|dataset SRC OUT"
"""What to type where something else was recognised than what is meant."""
ROW_TABLES = ("parquet", "arrow")
TRANSCRIPTS = ".trans.txt"
_BY_HF = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")
"""What Hugging Face `datasets` writes beside its tables."""
_ABOUT = ("README", "LICENSE", "LICENCE", "COPYING", "NOTICE", "CITATION", "CHANGELOG")
"""How files begin that tell of the data, and are none."""
_SPLIT = r"(train|training|val|valid|validation|dev|test|testing|eval|unsupervised)"
_SPLIT_NAME = re.compile(rf"{_SPLIT}(?:[-_. ].*|\d+)?", re.IGNORECASE)
_ARCHIVES = ("zip", "tgz", "gz", "bz2", "xz", "7z", "rar", "zst")


@dataclass
class Files:
    """The files of one split, or of all."""

    root: Path
    by_kind: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    """image, audio, array, rows, table, record, text, transcript, shard, archive, other: what there is, sorted."""

    def add(self, path: Path) -> None:
        """A file more."""
        self.by_kind[kind_of(path)].append(path)

    def count(self, kind: str) -> int:
        """How many there are of a kind."""
        return len(self.by_kind.get(kind, ()))


def kind_of(path: Path) -> str:
    """What a file is, by its name."""
    name, extension = path.name.lower(), text_files.kind_of(path)
    compressed = path.suffix[1:].lower() in _ARCHIVES
    if name in _BY_HF or extension.endswith("index.json"):
        return "other"
    if name.endswith(TRANSCRIPTS):
        return "transcript"
    if extension in text_files.TABLES:
        return "table"
    if extension in text_files.RECORDS:
        return "record"
    if extension in text_files.EXTENSIONS:
        return "other" if path.stem.upper().startswith(_ABOUT) else "text"
    if compressed:
        return "archive"
    kinds = {"image": vision.EXTENSIONS, "audio": speech.EXTENSIONS, "array": arrays.EXTENSIONS, "rows": ROW_TABLES}
    kinds["shard"] = ("tar",)
    return next((kind for kind, extensions in kinds.items() if extension in extensions), "other")


def files_below(source: Path) -> Files:
    """The files of a folder, or the one that it is; hidden ones are no content. Raises DataError."""
    if not source.exists():
        raise DataError(f"{source} does not exist.")
    found = Files(source)
    if source.is_file():
        found.add(source)
        return found
    for path, hidden in walk(source, False, ()):
        if not hidden:
            found.add(path)
    for paths in found.by_kind.values():
        paths.sort()
    return found


def splits(found: Files, kinds: list[str]) -> dict[str, Files]:
    """By name the files of each split for training and testing, that for training first; {} where there are none.

    A split is a folder of the source, or the beginning of a file's name. `kinds`: those that are content. Raises
    DataError where there are a split for training and one for testing, and files that are in neither.
    """
    parts: dict[str, Files] = {}
    outside: list[Path] = []
    for kind in kinds:
        for path in found.by_kind.get(kind, ()):
            name = _split_of(path, found.root)
            if name is None:
                outside.append(path)
            else:
                parts.setdefault(name, Files(found.root)).add(path)
    is_training = {name: name.lower().startswith("train") for name in parts}
    if not parts or (outside and len(set(is_training.values())) < 2):
        return {}  # a class may be called so
    if outside:
        names = ", ".join(sorted(parts))
        raise DataError(
            f"{found.root} is divided into {names}, and {len(outside)} files are in none of them, the first is "
            f"{outside[0]}.",
            f"Give one of the parts as SRC, or say what all of it is: {OVERRIDES}.",
        )
    return {name: parts[name] for name in sorted(parts, key=lambda name: (not is_training[name], name))}


def _split_of(path: Path, root: Path) -> str | None:
    relative = path.relative_to(root)
    if len(relative.parts) > 1 and _SPLIT_NAME.fullmatch(relative.parts[0]):
        return relative.parts[0]
    stem = relative.name.partition(".")[0]
    if kind_of(path) not in ("table", "record", "text", "rows"):
        return None
    for part in (*relative.parts[-2:-1], stem):  # `data/train-00000-of-00002.parquet`, `default/train/0000.parquet`
        if matched := _SPLIT_NAME.fullmatch(part):
            return matched[1].lower()
    return None
