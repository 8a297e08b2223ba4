"""Folders of images, recordings or text to WebDataset shards with an index; also the demo data: `d2v shards`."""

import argparse
import itertools
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from d2v_scale.data import demo, speech, text_files, tokenizer, vision
from d2v_scale.data.content import Content
from d2v_scale.data.conversion import Conversion, Item, Job, finite_number
from d2v_scale.data.folders import FoundFiles, find_files
from d2v_scale.data.shard_index import SetIndex, ShardEntry, relative_path
from d2v_scale.data.shard_jobs import run_all
from d2v_scale.data.shard_set import INDEX_SUFFIX
from d2v_scale.data.tables import Columns
from d2v_scale.data.text import IDS_INSTEAD, require_special_ids
from d2v_scale.data.text_files import Document, Reading, documents, transcripts
from d2v_scale.data.writing import shard_name
from d2v_scale.errors import DataError
from d2v_scale.files import file_sha256

_KEPT = 1000
_NAMED = 20


def file_items(found: FoundFiles, label: str | None, known: list[str]) -> tuple[list[Item], list[str]]:
    """Files in a fixed random order, and the classes. `label`: pattern whose group is the label; null: the folder."""
    labels: list[str | None] = []
    try:
        pattern = re.compile(label or "()")
    except re.error as error:
        raise DataError(f"--label {label!r} is no pattern: {error}.") from None
    if pattern.groups < 1:
        raise DataError(f"--label {label!r} has no group.", "Put parentheses around what is the label.")
    for path in found.files:
        if label is not None:
            matched = pattern.search(found.relative(path))
            labels.append(matched.group(1) if matched else None)
        else:
            folder = Path(found.relative(path)).parent
            labels.append(folder.as_posix() if folder != Path() else None)
    classes = _classes(labels, known)
    numbers = {name: number for number, name in enumerate(classes)}
    items = []
    for number, k in enumerate(np.random.default_rng(0).permutation(len(found.files))):
        name, named = f"{number:08d}-{_key(found.files[k].stem)}", labels[k]
        items.append(Item(name, str(found.files[k]), label=None if named is None else numbers[named]))
    return items, classes


def _key(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)[:80]


def _classes(labels: Iterable[str | None], known: list[str]) -> list[str]:
    new = sorted({label for label in labels if label is not None} - set(known))
    if new and known:
        raise DataError(f"The labels {', '.join(new[:5])} are not among the classes of the set that is in OUT already.")
    return known or new


def text_items(found: Iterable[Document], classes: list[str], score: bool) -> Iterator[Item]:
    """Documents as items. `score`: labels are numbers and not classes."""
    numbers = {label: number for number, label in enumerate(classes)}
    for number, document in enumerate(found):
        item = Item(f"{number:08d}", content=document.text, second=document.second)
        item.place, item.fault = document.place, document.fault
        if item.fault is not None:
            item.content, item.second = "", None
        elif score and document.label is not None:
            try:
                item.score = finite_number(document.label)
            except ValueError:
                item.fault = f"has the label {document.label!r}, which is no finite number"
        elif document.label is not None:
            item.label = numbers[document.label]
        yield item


def transcribed(items: list[Item], found: FoundFiles, texts: dict[str, str]) -> list[Item]:
    """The items with their texts, those without one left out. Raises DataError where no item has any, and where one
    text is of several."""
    names = [Path(found.relative(Path(str(item.path)))).with_suffix("") for item in items]
    called = Counter(name.name for name in names)
    for item, name in zip(items, names, strict=True):
        if name.as_posix() not in texts and name.name in texts and called[name.name] > 1:
            raise DataError(
                f"{called[name.name]} recordings are called {name.name!r}, which has one transcript.",
                "Write the path below SRC before each text.",
            )
        item.transcript = texts.get(name.as_posix(), texts.get(name.name)) or None
    kept = [item for item in items if item.transcript is not None]
    print(f"{len(kept)} of {len(items)} recordings have a transcript", file=sys.stderr)
    if not kept:
        raise DataError("No recording has a transcript.", "Lines are: path below SRC without ending, then the text.")
    return kept


def convert(arguments: argparse.Namespace) -> tuple[SetIndex, int]:
    """Convert SRC to shards and write their index; returns it, and how much was skipped. Raises DataError."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    command = COMMANDS[arguments.command]
    known = next(
        (index.classes for path in sorted(out.glob(f"*{INDEX_SUFFIX}")) if (index := SetIndex.load(path)).classes), []
    )
    conversion = Conversion(command.content)
    found, items, classes = command.read(arguments, conversion, known)
    if found.left_out():
        print(found.left_out(), file=sys.stderr)
    parts = run_all(_jobs(arguments, items, conversion), arguments.processes)
    index = SetIndex(content=command.content, shards=[ShardEntry(**part.entry) for part in parts], classes=classes)
    skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
    _judge(index, skipped, arguments.max_bad)
    if conversion.tokenizer is not None:
        index.tokenizer = relative_path(conversion.tokenizer, out)
        index.tokenizer_sha256 = conversion.tokenizer_sha256
    index.save(out / f"{arguments.prefix}{INDEX_SUFFIX}")
    return index, len(skipped)


class Command(ABC):
    """What one of the commands does: how files become items. Its options are in `d2v_scale.commands.make_shards`."""

    content: Content

    @abstractmethod
    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        """The files below SRC, what is to be converted of them, and the classes, which are `known` where a set of OUT
        has some; completes `conversion`."""


class Images(Command):
    """Files of pictures."""

    content = "image"

    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        found = find_files(arguments.source, vision.EXTENSIONS, arguments.match)
        conversion.resize, conversion.max_pixels = arguments.resize, arguments.max_pixels
        return found, *file_items(found, arguments.label, known)


class Recordings(Command):
    """Files of sound, perhaps with transcripts."""

    content = "recording"

    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        found = find_files(arguments.source, speech.EXTENSIONS, arguments.match)
        items, classes = file_items(found, arguments.label, known)
        if arguments.transcripts is not None:
            items = transcribed(items, found, transcripts(arguments.transcripts, arguments.encoding))
        return found, items, classes


class Texts(Command):
    """Files of documents, and their tokenizer."""

    content = "text"

    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        reading = Reading(split=arguments.documents, encoding=arguments.encoding)
        reading.columns = Columns.parse(arguments.columns) if arguments.columns else None
        found = find_files(arguments.source, text_files.EXTENSIONS, arguments.match, text_files.kind_of)
        model = _tokenizer(arguments, found.files, reading)
        conversion.tokenizer, conversion.tokenizer_sha256 = model, file_sha256(model)
        conversion.ids = arguments.ids
        sound = (document for document in documents(found.files, reading) if document.fault is None)
        classes = [] if arguments.score else _classes((document.label for document in sound), known)
        return found, text_items(documents(found.files, reading), classes, arguments.score), classes


COMMANDS: dict[str, Command] = {"images": Images(), "audio": Recordings(), "text": Texts()}


def _judge(index: SetIndex, skipped: dict[str, str], max_bad: float) -> None:
    """Say what was skipped, and keep it in the index. Raises DataError where it is too much."""
    index.skipped = dict(itertools.islice(skipped.items(), _KEPT))
    for name, reason in itertools.islice(skipped.items(), _NAMED):
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > _NAMED:
        print(f"skipped {len(skipped) - _NAMED} more", file=sys.stderr)
    total = len(skipped) + index.samples
    could_not = f"{len(skipped)} of {total} files or documents could not be read"
    if index.samples == 0:
        raise DataError(f"{could_not}, and nothing is left; no index was written.")
    if len(skipped) > max_bad * total:
        raise DataError(
            f"{could_not}, more than --max_bad {max_bad}; no index was written.",
            "Remove what is named above, leave it out with --match, or raise --max_bad.",
        )


def _tokenizer(arguments: argparse.Namespace, files: list[Path], reading: Reading) -> Path:
    """The given tokenizer, the one in OUT, or a new one trained on the documents."""
    if arguments.tokenizer is not None:
        if arguments.tokenizer.suffix == ".json":
            raise DataError(f"{arguments.tokenizer} is no sentencepiece model, and nothing else is read.", IDS_INSTEAD)
        require_special_ids(arguments.tokenizer)
        return arguments.tokenizer
    model: Path = arguments.out / "tokenizer.model"
    if not model.is_file():
        print(f"training a tokenizer of {arguments.vocab_size} pieces: {model}", file=sys.stderr)
        sound = (document for document in documents(files, reading) if document.fault is None)
        texts = (text for document in itertools.islice(sound, 1_000_000) for text in document.texts)
        size, fewer = arguments.vocab_size, arguments.fewer_pieces
        tokenizer.train(texts, model, vocab_size=size, threads=arguments.processes, fewer=fewer)
    require_special_ids(model)
    return model


def _jobs(arguments: argparse.Namespace, items: Iterable[Item], conversion: Conversion) -> Iterator[Job]:
    iterator = iter(items)
    for number in itertools.count():
        chosen = list(itertools.islice(iterator, arguments.per_shard))
        if not chosen:
            return
        yield Job(conversion, arguments.out / shard_name(arguments.prefix, number), chosen)


def make_demo(arguments: argparse.Namespace) -> None:
    """Write the demo sets; where a package is missing, the other demos go on."""
    wanted = list(demo.SETS) if arguments.modality == "all" else [arguments.modality]
    missing: list[str] = []
    for modality in wanted:
        try:
            print(demo.write(modality, arguments.out))
        except DataError as error:
            print(f"{modality}: {error}", file=sys.stderr)
            missing.append(modality)
    if len(missing) == len(wanted):
        raise DataError("No demo set could be written.", "See above.")
