"""`d2v shards audio`: folders of recordings, perhaps with transcripts."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from d2v_scale.conversion.command import Command, file_items
from d2v_scale.conversion.converters import Conversion, Item
from d2v_scale.conversion.folders import FoundFiles, find_files
from d2v_scale.conversion.text_files import transcripts_below
from d2v_scale.errors import DataError
from d2v_scale.modalities.speech import decoder as speech


class Recordings(Command):
    """Files of sound, perhaps with transcripts."""

    content = "recording"

    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        found = find_files(arguments.source, speech.EXTENSIONS, arguments.match)
        items, classes = file_items(found, arguments.label, known)
        if arguments.transcripts is not None:
            items = transcribed(items, found, transcripts_below(arguments.transcripts, arguments.encoding))
        return found, items, classes


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
