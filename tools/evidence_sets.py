"""The real sets that tools/evidence.py learns from: found in a folder, unpacked, converted to labelled shards."""

import csv
import hashlib
import json
import re
import sys
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from d2v_scale.errors import UserError
from d2v_scale.files import file_sha256
from d2v_scale.model.stem_config import Kind
from d2v_scale.programs.run_quietly import run_quietly
from d2v_scale.shards.shard_set import INDEX_SUFFIX

MAKE_SHARDS = Path(__file__).with_name("make_shards.py")
VOCABULARY = 2000
RECORDING = r"(?:^|/)([^/_]+)_[^/]*_(\d+)\.\w+$"
_AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".aif", ".au", ".oga")
_TEST_TAKES = 5
_TEST_ROW = 5
_COLUMN_NAME = r"[A-Za-z][A-Za-z_ ]{0,19}"


@dataclass(frozen=True)
class RealSet:
    """A labelled set as shards."""

    modality: Kind
    name: str
    train: str
    """Index file of the training split."""
    test: str

    @classmethod
    def in_folder(cls, modality: Kind, name: str, shards: Path) -> "RealSet":
        """Of the indices in this folder."""
        return cls(modality, name, *(str(shards / f"{split}{INDEX_SUFFIX}") for split in ("train", "test")))


def default_folder(repository: Path) -> Path:
    """`data` in the repository or in a folder beside it, whichever holds sets, and says which. Raises UserError."""
    for folder in (repository / "data", *sorted(repository.parent.glob("*/data"))):
        if folder.is_dir() and (
            any(folder.glob("*.csv")) or any(folder.glob("*.tar.gz")) or any(folder.glob("*/train"))
        ):
            print(f"Real sets of {folder} (--data DIR for others)", flush=True)
            return folder
    raise UserError("No folder of real sets was found.", "Give one with --data DIR; see --help for its layout.")


def prepare(data: Path, out: Path, modalities: list[Kind]) -> dict[Kind, RealSet]:
    """Shards below `out` for every modality, from the folder `data`. Shards of the same files are left alone.

    Raises UserError for a modality that `data` holds no set of, or one that cannot be read.
    """
    roots = _roots(data, out)
    found = {modality: _find(modality, roots) for modality in modalities}
    missing = [modality for modality, sources in found.items() if not sources]
    if missing:
        wanted = "; ".join(f"{modality}: {LAYOUTS[modality].described}" for modality in missing)
        raise UserError(
            f"{data} holds no set for {', '.join(missing)} (wanted: {wanted}).",
            "Add it, or choose others with --modalities.",
        )
    for modality, (_, *others) in found.items():
        if others:
            names = ", ".join(str(path) for path in others)
            print(f"One set for {modality} is taken; left alone: {names}", flush=True)
    return {modality: _convert(modality, sources[0], out) for modality, sources in found.items()}


def array_folders(name: str, data: Path, out: Path) -> RealSet:
    """Shards below `out` of the set NAME/{train,test}/CLASS/*.npy in `data` or an archive of it. Raises UserError."""
    return _array_shards(name, _named(name, data, out), out, lambda path: path)


def image_arrays(name: str, data: Path, out: Path) -> RealSet:
    """Likewise of NAME/{train,test}/CLASS/*.jpg, each image an array (3, height, width). Raises UserError."""
    return _array_shards(name, _named(name, data, out), out, lambda path: _pixels_beside(path, out))


def _array_shards(name: str, source: Path, out: Path, arrays_of: Callable[[Path], Path]) -> RealSet:
    shards = out / "shards" / f"array-{name}-{fingerprint(source)}"
    for split in ("train", "test"):
        if not (shards / f"{split}{INDEX_SUFFIX}").is_file():
            make_shards("arrays", str(arrays_of(source / split)), out=shards, split=split)
    return RealSet.in_folder("array", name, shards)


def _pixels_beside(images: Path, out: Path) -> Path:
    """A folder below `out` with a `.npy` (3, height, width) for each image."""
    target = out / "pixels" / images.parent.name / images.name
    for path in _files(images):
        file = (target / path.relative_to(images)).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            np.save(file, np.moveaxis(np.asarray(image.convert("RGB")), 2, 0))
    return target


def _named(name: str, data: Path, out: Path) -> Path:
    """The folder of a set of this name with both splits. Raises UserError."""
    found = folder_of(name, data, out)
    if found is None:
        raise UserError(f"{data} holds no {name}, as a folder or in an archive.", "Add it, or leave its rows out.")
    for split in ("train", "test"):
        if not (found / split).is_dir():
            raise UserError(f"{found} has no folder {split}.", f"Lay it out as {name}/{{train,test}}/CLASS/FILE.")
    return found


def folder_of(name: str, data: Path, out: Path) -> Path | None:
    """The folder of this name in `data` or an archive of it, which is unpacked below `out`; None: there is none."""
    return next((root / name for root in _roots(data, out) if (root / name).is_dir()), None)


def recordings_of(data: Path, out: Path) -> Path:
    """The folder fsdd/recordings of `data` or an archive of it. Raises UserError."""
    source = folder_of("fsdd", data, out)
    if source is None or not (source / "recordings").is_dir():
        raise UserError(f"{data} holds no fsdd, as a folder or in an archive.", "Add it, or leave its rows out.")
    Recordings().check(source)
    return source / "recordings"


def digit_recordings(data: Path, out: Path) -> dict[str, list[tuple[str, Path]]]:
    """Label and file of fsdd/recordings/LABEL_SPEAKER_TAKE.wav in `data` or an archive of it, by split. Raises
    UserError."""
    found: dict[str, list[tuple[str, Path]]] = {"train": [], "test": []}
    for path in _files(recordings_of(data, out)):
        if match := re.search(RECORDING, path.name):
            found["test" if int(match[2]) < _TEST_TAKES else "train"].append((match[1], path))
    return found


def _roots(data: Path, out: Path) -> list[Path]:
    if not data.is_dir():
        raise UserError(f"{data} is not a folder.", "Give the folder of the sets with --data DIR.")
    return [data, *_unpacked(data, out / "unpacked")]


def _unpacked(data: Path, target: Path) -> list[Path]:
    """Unpack every archive of `data` once, each into a folder of its own; the folders."""
    folders = []
    for archive in sorted(data.glob("*.tar.gz")):
        folder = target / f"{archive.name.removesuffix('.tar.gz')}-{file_sha256(archive)[:8]}"
        done = folder / ".unpacked"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with tarfile.open(archive) as tar:
                    tar.extractall(folder, filter="data")
            except (tarfile.TarError, OSError, EOFError) as error:
                raise UserError(f"{archive} cannot be unpacked: {error}.", "Fetch it again.") from error
            done.touch()
        folders.append(folder)
    return folders


def _find(modality: Kind, roots: list[Path]) -> list[Path]:
    """Sets of that layout, the one to take first."""
    layout, found = LAYOUTS[modality], list[Path]()
    for pattern in layout.patterns:
        for root in roots:
            for path in sorted(root.glob(pattern)):
                source = layout.source_of(path)
                if source is not None and source not in found:
                    found.append(source)
    return found


def _convert(modality: Kind, source: Path, out: Path) -> RealSet:
    """Shards in a folder named after the set and what is in it, so that another set is never taken for it."""
    layout = LAYOUTS[modality]
    layout.check(source)
    shards = out / "shards" / f"{modality}-{source.stem}-{fingerprint(source)}"
    real = RealSet.in_folder(modality, source.stem, shards)
    for split in ("train", "test"):
        # Training first: the tokenizer and the classes are its.
        if not (shards / f"{split}{INDEX_SUFFIX}").is_file():
            make_shards(*layout.arguments(source, split, shards), out=shards, split=split)
    return real


def fingerprint(source: Path) -> str:
    """Of a CSV's content, or of the names, sizes and times of a folder's files."""
    if source.is_file():
        return file_sha256(source)[:12]
    files = sorted(path for path in source.rglob("*") if path.is_file())
    about = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(source), about)).encode()).hexdigest()[:12]


class Layout(ABC):
    """How the files of a set lie, and what of them is training's and what is the test's."""

    described: str
    patterns: tuple[str, ...]
    """What shows that there is such a set; the first is looked for first."""

    @abstractmethod
    def source_of(self, path: Path) -> Path | None:
        """The set that a path of `patterns` shows; None: it shows none."""

    @abstractmethod
    def check(self, source: Path) -> None:
        """Raises UserError where the layout leaves a file or a class out; says how many test files are training's,
        too."""

    @abstractmethod
    def arguments(self, source: Path, split: str, shards: Path) -> list[str]:
        """What tools/make_shards.py is told of a split."""


class ImageFolders(Layout):
    """A folder a class."""

    described = "NAME/{train,test}/CLASS/*.jpg"
    patterns = ("*/train",)

    def source_of(self, path: Path) -> Path | None:
        return path.parent if path.is_dir() and (path.parent / "test").is_dir() else None

    def check(self, source: Path) -> None:
        splits = {split: _files(source / split) for split in ("train", "test")}
        labels = {split: {path.parent.name for path in files} for split, files in splits.items()}
        _require_both(source, splits, labels, "every class needs a folder in both")

    def arguments(self, source: Path, split: str, shards: Path) -> list[str]:
        return ["images", str(source / split)]


class Recordings(Layout):
    """Names that say who speaks, and what."""

    described = "NAME/recordings/LABEL_SPEAKER_TAKE.wav"
    patterns = ("*/recordings",)

    def source_of(self, path: Path) -> Path | None:
        return path.parent if path.is_dir() else None

    def check(self, source: Path) -> None:
        files = [path for path in _files(source / "recordings") if path.suffix.lower() in _AUDIO]
        named = {path: re.search(RECORDING, path.name) for path in files}
        odd = [path.name for path, match in named.items() if match is None]
        if odd or not files:
            what = f"{len(odd)} names of other forms, {odd[0]} the first" if odd else "no recordings"
            raise UserError(f"{source / 'recordings'} holds {what}.", "Name all LABEL_SPEAKER_TAKE.wav.")
        is_test = {path: int(match[2]) < _TEST_TAKES for path, match in named.items() if match}
        splits = {split: [path for path in files if is_test[path] == (split == "test")] for split in ("train", "test")}
        labels = {split: {path.name.split("_")[0] for path in found} for split, found in splits.items()}
        rule = f"takes 0 to {_TEST_TAKES - 1} are the test part, and every label needs others, too"
        _require_both(source, splits, labels, rule)

    def arguments(self, source: Path, split: str, shards: Path) -> list[str]:
        takes = f"0*[0-{_TEST_TAKES - 1}]"
        match = rf"_{takes}\.\w+$" if split == "test" else rf"_(?!{takes}\.)\d+\.\w+$"
        return ["audio", str(source / "recordings"), "--match", match, "--label", RECORDING]


class News(Layout):
    """A table of texts."""

    described = "NAME.csv (class, title, text; no header)"
    patterns = ("ag_news*.csv", "*.csv")

    def source_of(self, path: Path) -> Path | None:
        return path

    def check(self, source: Path) -> None:
        """Nothing: its rows are judged where they are read."""

    def arguments(self, source: Path, split: str, shards: Path) -> list[str]:
        return ["text", str(_news(source, split, shards)), "--vocab_size", str(VOCABULARY), "--fewer_pieces"]


# One layout of files a modality: what a folder of sets is searched for.
LAYOUTS: dict[Kind, Layout] = {"vision": ImageFolders(), "speech": Recordings(), "text": News()}


def _require_both(source: Path, splits: dict[str, list[Path]], labels: dict[str, set[str]], rule: str) -> None:
    only = sorted(labels["test"] - labels["train"])
    if only or not all(splits.values()):
        what = f"class {only[0]!r} of {source} is" if only else f"all files of {source} are"
        raise UserError(f"{what[0].upper()}{what[1:]} in one part only: {rule}.", "Add files, or leave the class out.")
    _say_repeated(source, *({file_sha256(path) for path in splits[split]} for split in ("train", "test")))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _say_repeated(source: Path, train: Iterable[str], test: Iterable[str]) -> None:
    both = len(set(train) & set(test))
    if both:
        print(f"{source}: {both} test samples are in the training part, too", flush=True)


def _news(source: Path, split: str, target: Path) -> Path:
    """One split of the CSV as JSONL: every fifth row is test. What is left out is said with the training part."""
    csv.field_size_limit(sys.maxsize)
    try:
        with source.open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{source} cannot be read: {error}.", "Write it as UTF-8, its texts in quotation marks."
        ) from None
    notes = []
    if _has_header(rows):
        notes.append(f"its first row ({', '.join(rows[0])}) is taken for a header")
        rows = rows[1:]
    short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
    if not rows or short is not None:
        what = "is empty" if short is None else f"has a row without text (row {short})"
        raise UserError(f"{source} {what}.", "Its columns are class, title and text, without a header.")
    train = [row for number, row in enumerate(rows, 1) if number % _TEST_ROW]
    test = rows[_TEST_ROW - 1 :: _TEST_ROW]
    known = {label for label, *_ in train}
    unknown = {label for label, *_ in test} - known
    if unknown:
        notes.append(f"test rows of classes that training has not are left out ({', '.join(sorted(unknown))})")
        test = [row for row in test if row[0] in known]
    if split == "train":
        for note in notes:
            print(f"{source}: {note}", flush=True)
        _say_repeated(source, *({". ".join(texts) for _, *texts in part} for part in (train, test)))
    path = target / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for label, *texts in train if split == "train" else test:
            stream.write(json.dumps({"text": ". ".join(texts), "label": label}) + "\n")
    return path


def _has_header(rows: list[list[str]]) -> bool:
    """Whether the first row names columns: its class is nobody else's, and its cells are short words."""
    if len(rows) < 2 or any(row[0] == rows[0][0] for row in rows[1:]):
        return False
    return all(re.fullmatch(_COLUMN_NAME, cell.strip()) for cell in rows[0])


def make_shards(*arguments: str, out: Path, split: str) -> None:
    """Run tools/make_shards.py: its command and source, then options. Raises UserError."""
    command, source, *options = arguments
    program = [sys.executable, str(MAKE_SHARDS), command, source, str(out), "--prefix", split, *options]
    run_quietly(program, f"The conversion of {source}")
