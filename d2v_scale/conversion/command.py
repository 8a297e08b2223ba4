"""What each command of `d2v shards` says of itself: how files become items, and which classes they have."""

import argparse
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from d2v_scale.conversion.converters import Conversion, Item
from d2v_scale.conversion.folders import FoundFiles
from d2v_scale.errors import DataError
from d2v_scale.shards.content import Content

NO_LABEL = "none"


class Command(ABC):
    """What one of the commands does: how files become items. Its options are in `d2v_scale.commands.make_shards`."""

    content: Content

    @abstractmethod
    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        """The files below SRC, what is to be converted of them, and the classes, which are `known` where a set of OUT
        has some; completes `conversion`."""


def file_items(found: FoundFiles, label: str | None, known: list[str]) -> tuple[list[Item], list[str]]:
    """Files in a fixed random order, and the classes. `label`: pattern whose group is the label; `none`: there is none;
    null: the folder."""
    labels: list[str | None] = []
    try:
        pattern = re.compile("()" if label in (None, NO_LABEL) else label)
    except re.error as error:
        raise DataError(f"--label {label!r} is no pattern: {error}.") from None
    if pattern.groups < 1:
        raise DataError(f"--label {label!r} has no group.", "Put parentheses around what is the label.")
    for path in found.files:
        if label == NO_LABEL:
            labels.append(None)
        elif label is not None:
            matched = pattern.search(found.relative(path))
            labels.append(matched.group(1) if matched else None)
        else:
            folder = Path(found.relative(path)).parent
            labels.append(folder.as_posix() if folder != Path() else None)
    classes = classes_of(labels, known)
    numbers = {name: number for number, name in enumerate(classes)}
    items = []
    for number, k in enumerate(np.random.default_rng(0).permutation(len(found.files))):
        name, named = f"{number:08d}-{_key(found.files[k].stem)}", labels[k]
        items.append(Item(name, str(found.files[k]), label=None if named is None else numbers[named]))
    return items, classes


def _key(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)[:80]


def classes_of(labels: Iterable[str | None], known: list[str]) -> list[str]:
    """The labels in order, or `known`. Raises DataError for one that is not among those."""
    new = sorted({label for label in labels if label is not None} - set(known))
    if new and known:
        raise DataError(f"The labels {', '.join(new[:5])} are not among the classes of the set that is in OUT already.")
    return known or new
