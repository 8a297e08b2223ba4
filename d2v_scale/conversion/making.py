"""Folders of images, recordings, texts or arrays to WebDataset shards with an index, and demo data: `d2v shards`."""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path

from d2v_scale.conversion import demo
from d2v_scale.conversion.arrays import Arrays
from d2v_scale.conversion.command import Command
from d2v_scale.conversion.converters import Conversion, Item, Job
from d2v_scale.conversion.images import Images
from d2v_scale.conversion.new_sets import NewSet
from d2v_scale.conversion.recordings import Recordings
from d2v_scale.conversion.texts import Texts
from d2v_scale.errors import DataError
from d2v_scale.shards.shard_index import SetIndex

COMMANDS: dict[str, Command] = {"images": Images(), "audio": Recordings(), "text": Texts(), "arrays": Arrays()}


def convert(arguments: argparse.Namespace, new: NewSet) -> tuple[SetIndex, int] | None:
    """Convert SRC to shards and write their index; returns it, and how much was skipped; None where other parts of the
    work are to be done yet. Raises DataError."""
    command = COMMANDS[arguments.command]
    known = new.known_classes()
    conversion = Conversion(command.content)
    found, items, classes = command.read(arguments, conversion, known)
    if found.left_out():
        print(found.left_out(), file=sys.stderr)
    total = len(items) if isinstance(items, Sized) else None
    if total is not None:
        print(f"{total:,} samples to be written to {-(-total // new.per_shard)} shards in {new.out}", file=sys.stderr)
    parts = new.run(_jobs(new, items, conversion), total)
    if parts is None:
        return None
    index = SetIndex(content=command.content, shards=[], classes=classes)
    return index, new.save(index, parts, conversion.tokenizer)


def _jobs(new: NewSet, items: Iterable[Item], conversion: Conversion) -> Iterator[Job]:
    iterator = iter(items)
    for number in itertools.count():
        chosen = list(itertools.islice(iterator, new.per_shard))
        if not chosen:
            return
        yield Job(new.tar(number), conversion, chosen)


def make_demo(modality: str, out: Path) -> None:
    """Write a demo set, or `all`; where a package is missing, the other demos go on. Raises DataError."""
    wanted = list(demo.SETS) if modality == "all" else [modality]
    missing: list[str] = []
    for one in wanted:
        try:
            print(demo.write(one, out))
        except DataError as error:
            print(f"{one}: {error}", file=sys.stderr)
            missing.append(one)
    if len(missing) == len(wanted):
        raise DataError("No demo set could be written.", "See above.")
