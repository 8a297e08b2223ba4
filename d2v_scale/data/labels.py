"""Labels beside the data of a sample: classes (`.cls`), scores (`.score`), transcripts (`.txt` beside a recording)."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_scale.data.config import LETTERS
from d2v_scale.shards.reading import RawSample

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "|"]


MOST_CLASSES = 100_000
"""Numbers from here on are ids of something, and no classes: heads and lists of names have a row for each class."""


def class_number(label: bytes | memoryview) -> int:
    """The class in a `.cls`. Raises ValueError for any other label."""
    text = bytes(label).decode("utf-8", "backslashreplace").strip()
    if not text.isdecimal() or int(text) >= MOST_CLASSES:
        raise ValueError(f"its .cls is {text[:40]!r}, which is no class number below {MOST_CLASSES}")
    return int(text)


class Labels(Protocol):
    """How the label of a sample is read, and labels become a tensor."""

    extension: str
    """The member that holds the label."""

    def read(self, sample: RawSample) -> Any:
        """The label of a sample. Raises SampleFault or ValueError."""

    def stack(self, labels: list[Any]) -> Tensor:
        """Labels of a batch. None stands for a row without."""


class ClassLabels:
    """An integer from 0 in `.cls`; int64 (B,), -1: none."""

    extension = "cls"

    def __init__(self, classes: int | None = None) -> None:
        """`classes`: how many there are; None: any number."""
        self._classes = classes

    def read(self, sample: RawSample) -> int:
        """The class. One that there is not is a fault of the sample."""
        label = class_number(sample.member((self.extension,))[1])
        if self._classes is not None and label >= self._classes:
            raise sample.fault(f"its .cls is {label}, classes are 0 to {self._classes - 1}")
        return label

    def stack(self, labels: list[int | None]) -> Tensor:
        """int64 (B,)."""
        return torch.tensor([-1 if label is None else label for label in labels], dtype=torch.int64)


class Scores:
    """A number in `.score`; float32 (B,), NaN: none."""

    extension = "score"

    def read(self, sample: RawSample) -> float:
        """The score. Raises ValueError for one that is no finite number."""
        score = float(_text(sample, self.extension))
        if not math.isfinite(score):
            raise ValueError(f"its .score is {score}")
        return score

    def stack(self, labels: list[float | None]) -> Tensor:
        """float32 (B,)."""
        return torch.tensor([float("nan") if label is None else label for label in labels], dtype=torch.float32)


class Vocabulary:
    """Characters as the outputs of a CTC head: number 0 is the blank, 4 the space between words."""

    blank = 0
    unknown = 3
    space = 4

    def __init__(self, letters: str = LETTERS) -> None:
        self.pieces = [*_SPECIAL, *letters]
        self._number = {piece: number for number, piece in enumerate(self.pieces)} | {" ": self.space}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Numbers of a text (U,); a letter is taken in the case that the vocabulary has, others are <unk>."""
        return np.array([self._number.get(letter, self.unknown) for letter in self.fold(text)], dtype=np.int64)

    def fold(self, text: str) -> str:
        """The text with single spaces and each letter in the case that the vocabulary has; others as they are."""
        return "".join(self._fold(letter) for letter in " ".join(text.split()))

    def _fold(self, letter: str) -> str:
        cases = (letter, letter.upper(), letter.lower())
        return next((written for written in cases if written in self._number), letter)

    def decode(self, numbers: list[int]) -> str:
        """The text of numbers that hold no repeats any more; pieces that are no characters are left out."""
        characters = [" " if n == self.space else self.pieces[n] for n in numbers if n >= self.space]
        return " ".join("".join(characters).split())


class Transcripts:
    """A text in `.txt`; int64 (B, U) numbers of its characters, filled with -1."""

    extension = "txt"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def read(self, sample: RawSample) -> NDArray[np.int64]:
        """The characters (U,)."""
        return self.vocabulary.encode(_text(sample, self.extension))

    def stack(self, labels: list[NDArray[np.int64] | None]) -> Tensor:
        """int64 (B, U)."""
        rows = [np.zeros(0, dtype=np.int64) if label is None else label for label in labels]
        longest = max((len(row) for row in rows), default=0)
        filled = np.full((len(rows), max(1, longest)), -1, dtype=np.int64)
        for k, row in enumerate(rows):
            filled[k, : len(row)] = row
        return torch.from_numpy(filled)


class SpokenTexts(Transcripts):
    """A text in `.txt` as answers are compared with it, whole: int64 (B, U) code points, filled with -1.

    A character that the vocabulary lacks cannot be answered, and counts as an error.
    """

    def read(self, sample: RawSample) -> NDArray[np.int64]:
        """The code points (U,) of the folded text."""
        return np.array([ord(letter) for letter in self.vocabulary.fold(_text(sample, self.extension))], dtype=np.int64)


def _text(sample: RawSample, extension: str) -> str:
    return bytes(sample.member((extension,))[1]).decode("utf-8")
