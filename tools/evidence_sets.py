"""The real sets that tools/evidence.py learns from: found in a folder, unpacked, converted to labelled shards."""

import csv
import json
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from run_quietly import run_quietly

from d2v_scale.data.shard_set import INDEX_SUFFIX
from d2v_scale.errors import UserError
from d2v_scale.model.config import Modality

MAKE_SHARDS = Path(__file__).with_name("make_shards.py")
VOCABULARY = 2000
LAYOUTS: dict[Modality, str] = {
    "vision": "NAME/{train,test}/CLASS/*.jpg",
    "speech": "NAME/recordings/LABEL_SPEAKER_TAKE.wav",
    "text": "NAME.csv (class, title, text; no header)",
}
_RECORDING = r"(?:^|/)([^/_]+)_[^/]*_(\d+)\.\w+$"
_TEST_TAKES = 5
_TEST_ROW = 5


@dataclass(frozen=True)
class RealSet:
    """A labelled set as shards."""

    modality: Modality
    name: str
    train: str
    """Index file of the training split."""
    test: str


def default_folder(repository: Path) -> Path:
    """`data` in the repository or in a folder beside it, whichever holds sets, and says which. Raises UserError."""
    for folder in (repository / "data", *sorted(repository.parent.glob("*/data"))):
        if folder.is_dir() and (
            any(folder.glob("*.csv")) or any(folder.glob("*.tar.gz")) or any(folder.glob("*/train"))
        ):
            print(f"Real sets of {folder} (--data DIR for others)", flush=True)
            return folder
    raise UserError("No folder of real sets was found.", "Give one with --data DIR; see --help for its layout.")


def prepare(data: Path, out: Path, modalities: list[Modality]) -> dict[Modality, RealSet]:
    """Shards below `out` for every modality, from the folder `data`. Sets that are there already are left alone.

    Raises UserError for a modality that `data` holds no set of, or one that cannot be read.
    """
    if not data.is_dir():
        raise UserError(f"{data} is not a folder.", "Give the folder of the sets with --data DIR.")
    roots = [data, _unpacked(data, out / "unpacked")]
    sources = {modality: _find(modality, roots) for modality in modalities}
    missing = [modality for modality, source in sources.items() if source is None]
    if missing:
        wanted = "; ".join(f"{modality}: {LAYOUTS[modality]}" for modality in missing)
        raise UserError(
            f"{data} holds no set for {', '.join(missing)} (wanted: {wanted}).",
            "Add it, or choose others with --modalities.",
        )
    return {modality: _convert(modality, source, out) for modality, source in sources.items() if source is not None}


def _unpacked(data: Path, target: Path) -> Path:
    """Unpack every archive of `data` once; returns where they are."""
    for archive in sorted(data.glob("*.tar.gz")):
        done = target / f".{archive.name}"
        if not done.exists():
            target.mkdir(parents=True, exist_ok=True)
            try:
                with tarfile.open(archive) as tar:
                    tar.extractall(target, filter="data")
            except (tarfile.TarError, OSError, EOFError) as error:
                raise UserError(f"{archive} cannot be unpacked: {error}.", "Fetch it again.") from error
            done.touch()
    return target


def _find(modality: Modality, roots: list[Path]) -> Path | None:
    patterns = {"vision": ("*/train",), "speech": ("*/recordings",), "text": ("ag_news*.csv", "*.csv")}[modality]
    for pattern in patterns:
        for root in roots:
            for path in sorted(root.glob(pattern)):
                if modality == "text" or (path.is_dir() and (modality == "speech" or (path.parent / "test").is_dir())):
                    return path if modality == "text" else path.parent
    return None


def _convert(modality: Modality, source: Path, out: Path) -> RealSet:
    shards = out / "shards" / modality
    real = RealSet(modality, source.stem, str(shards / f"train{INDEX_SUFFIX}"), str(shards / f"test{INDEX_SUFFIX}"))
    for split in ("train", "test"):
        # Training first: the tokenizer and the classes are its.
        if not (shards / f"{split}{INDEX_SUFFIX}").is_file():
            _make_shards(*_arguments(modality, source, split, out), out=shards, split=split)
    return real


def _arguments(modality: Modality, source: Path, split: str, out: Path) -> list[str]:
    match modality:
        case "vision":
            return ["images", str(source / split)]
        case "speech":
            takes = f"0*[0-{_TEST_TAKES - 1}]"
            match = rf"_{takes}\.\w+$" if split == "test" else rf"_(?!{takes}\.)\d+\.\w+$"
            return ["audio", str(source / "recordings"), "--match", match, "--label", _RECORDING]
        case "text":
            return ["text", str(_news(source, split, out)), "--vocab_size", str(VOCABULARY)]


def _news(source: Path, split: str, out: Path) -> Path:
    """One split of the CSV as JSONL: every fifth row is test."""
    with source.open(encoding="utf-8-sig", newline="") as stream:
        rows = [row for row in csv.reader(stream) if row]
    if len(rows) > 1 and not re.fullmatch(r"\d+", rows[0][0]) and re.fullmatch(r"\d+", rows[1][0]):
        rows = rows[1:]  # a header
    short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
    if not rows or short is not None:
        what = "is empty" if short is None else f"has a row without text (row {short})"
        raise UserError(f"{source} {what}.", "Its columns are class, title and text, without a header.")
    target = out / "text" / f"{split}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as stream:
        for number, (label, *texts) in enumerate(rows, 1):
            if (number % _TEST_ROW == 0) == (split == "test"):
                stream.write(json.dumps({"text": ". ".join(texts), "label": label}) + "\n")
    return target


def _make_shards(*arguments: str, out: Path, split: str) -> None:
    command, source, *options = arguments
    program = [sys.executable, str(MAKE_SHARDS), command, source, str(out), "--prefix", split, *options]
    run_quietly(program, f"The conversion of {source}")
