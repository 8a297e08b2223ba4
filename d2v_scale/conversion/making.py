"""Folders of images, recordings, texts or arrays to WebDataset shards with an index, and demo data: `d2v shards`."""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2v_scale.conversion import demo
from d2v_scale.conversion.arrays import Arrays
from d2v_scale.conversion.command import Command
from d2v_scale.conversion.converters import Conversion, Item, Job
from d2v_scale.conversion.images import Images
from d2v_scale.conversion.recordings import Recordings
from d2v_scale.conversion.texts import Texts
from d2v_scale.errors import DataError
from d2v_scale.shards.shard_index import SetIndex, ShardEntry, relative_path
from d2v_scale.shards.shard_jobs import run_all
from d2v_scale.shards.shard_set import INDEX_SUFFIX
from d2v_scale.shards.writing import shard_name

_KEPT = 1000
_NAMED = 20

COMMANDS: dict[str, Command] = {"images": Images(), "audio": Recordings(), "text": Texts(), "arrays": Arrays()}


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
    judge(index, skipped, arguments.max_bad)
    if conversion.tokenizer is not None:
        index.tokenizer = relative_path(conversion.tokenizer, out)
        index.tokenizer_sha256 = conversion.tokenizer_sha256
    index.save(out / f"{arguments.prefix}{INDEX_SUFFIX}")
    return index, len(skipped)


def judge(
    index: SetIndex,
    skipped: dict[str, str],
    max_bad: float,
    what: str = "files or documents",
    cure: str = "Remove what is named above, leave it out with --match",
) -> None:
    """Say what was skipped, and keep it in the index. Raises DataError where it is too much, with the `cure`."""
    index.skipped = dict(itertools.islice(skipped.items(), _KEPT))
    for name, reason in itertools.islice(skipped.items(), _NAMED):
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > _NAMED:
        print(f"skipped {len(skipped) - _NAMED} more", file=sys.stderr)
    total = len(skipped) + index.samples
    could_not = f"{len(skipped)} of {total} {what} could not be read"
    if index.samples == 0:
        raise DataError(f"{could_not}, and nothing is left; no index was written.")
    if len(skipped) > max_bad * total:
        raise DataError(
            f"{could_not}, more than --max_bad {max_bad}; no index was written.",
            f"{cure}, or raise --max_bad.",
        )


def _jobs(arguments: argparse.Namespace, items: Iterable[Item], conversion: Conversion) -> Iterator[Job]:
    iterator = iter(items)
    for number in itertools.count():
        chosen = list(itertools.islice(iterator, arguments.per_shard))
        if not chosen:
            return
        yield Job(arguments.out / shard_name(arguments.prefix, number), conversion, chosen)


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
