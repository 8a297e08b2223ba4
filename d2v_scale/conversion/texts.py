"""`d2v shards text`: files of documents, and their tokenizer."""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from d2v_scale.conversion import text_files
from d2v_scale.conversion.command import Command, classes_of
from d2v_scale.conversion.converters import Conversion, Item, finite_number
from d2v_scale.conversion.folders import FoundFiles, find_files
from d2v_scale.conversion.tables import Columns
from d2v_scale.conversion.text_files import Document, Reading, documents
from d2v_scale.errors import DataError
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.modalities.text.tokenizer import PIECES, tokenizer_sha256, usable_tokenizer


class Texts(Command):
    """Files of documents, and their tokenizer."""

    content = "text"

    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        reading = Reading(split=arguments.documents, encoding=arguments.encoding)
        reading.columns = Columns.parse(arguments.columns) if arguments.columns else None
        found = find_files(arguments.source, text_files.EXTENSIONS, arguments.match, text_files.kind_of)
        model = given_tokenizer(arguments, lambda: _texts(found.files, reading))
        conversion.tokenizer, conversion.tokenizer_sha256 = model, tokenizer_sha256(model)
        conversion.ids = arguments.ids
        labels: set[str | None] = set()
        total = 0
        for document in documents(found.files, reading):
            total += 1
            labels |= {document.label} if document.fault is None else set()
        classes = [] if arguments.score else classes_of(labels, known)
        items = text_items(documents(found.files, reading), classes, arguments.score)
        return found, CountedItems(items, total), classes


@dataclass
class CountedItems(Iterable[Item]):
    """Items that are made one after the other, once, and their number."""

    items: Iterator[Item]
    total: int

    def __iter__(self) -> Iterator[Item]:
        return self.items

    def __len__(self) -> int:
        return self.total


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


def _texts(files: list[Path], reading: Reading) -> Iterator[str]:
    """Of the first million documents."""
    sound = (document for document in documents(files, reading) if document.fault is None)
    return (text for document in itertools.islice(sound, 1_000_000) for text in document.texts)


def given_tokenizer(arguments: argparse.Namespace, texts: Callable[[], Iterator[str]]) -> Path:
    """The given tokenizer, the one in OUT, or a new one trained on the texts."""
    if arguments.tokenizer is not None:
        return usable_tokenizer(arguments.tokenizer)
    model: Path = arguments.out / PIECES
    if not model.is_file():
        if arguments.part[1] > 1:
            raise DataError(
                f"There is no {model}, and each part of the work would train a tokenizer of its own.",
                f"Train it first: d2v tokenizer {arguments.source} {model} --vocab_size {arguments.vocab_size}.",
            )
        print(f"training a tokenizer of {arguments.vocab_size} pieces: {model}", file=sys.stderr)
        size, fewer = arguments.vocab_size, arguments.fewer_pieces
        tokenizer_training.train(texts(), model, vocab_size=size, threads=arguments.processes, fewer=fewer)
    return usable_tokenizer(model)
