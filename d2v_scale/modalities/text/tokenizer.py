"""What makes ids of texts: the interface, and the files that hold one.

Two kinds are read: sentencepiece models (`pieces.py`), and what Hugging Face's tokenizers publish (`published.py`):
tokenizer.json, or vocab.json with merges.txt beside it. Everywhere a tokenizer is named by one file; a folder stands
for the file of it that is found first.
"""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2v_scale.errors import ConfigError, DataError
from d2v_scale.files import file_sha256
from d2v_scale.model.stem_config import TextStem

Tokens = NDArray[np.int64]

PUBLISHED = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
PIECES = "tokenizer.model"
SETTINGS = "tokenizer_config.json"
_ORDER = (PIECES, PUBLISHED, VOCABULARY)
"""Of several in a folder the first one stands for it."""
_BESIDE = (SETTINGS, "special_tokens_map.json", "added_tokens.json")
_WORDS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}


class SpecialIds(NamedTuple):
    """Ids of the words that are no text; -1: there is none."""

    bos: int
    """Before every row, <s> or [CLS]."""
    pad: int
    eos: int
    """After every document, </s> or [SEP]."""
    unk: int
    mask: int


class Tokenizer(ABC):
    """Makes ids of texts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str) -> Tokens:
        """int64 ids of one document, </s> at its end."""
        return np.array([*self.encode(text), self.special_ids.eos], dtype=np.int64)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones left out."""

    @abstractmethod
    def piece(self, number: int) -> str:
        """The text of one id, for previews."""

    @property
    @abstractmethod
    def size(self) -> int:
        """All ids that it gives are below this."""

    @property
    @abstractmethod
    def special_ids(self) -> SpecialIds:
        """Of its special words."""

    @abstractmethod
    def check_mask(self, stem: TextStem) -> None:
        """Raises ConfigError where the model's <mask> is not the tokenizer's, or its vocabulary too small."""

    @property
    def stem(self) -> TextStem:
        """A stem that it fits, all else as is usual."""
        ids = self.special_ids
        size = max(self.size, ids.mask + 1)
        return TextStem(
            vocab_size=size, bos_id=ids.bos, pad_id=ids.pad, eos_id=ids.eos, unk_id=ids.unk, mask_id=ids.mask
        )

    def check(self, stem: TextStem) -> None:
        """Raises ConfigError where it does not fit the model."""
        theirs, mine = (stem.bos_id, stem.pad_id, stem.eos_id, stem.unk_id), tuple(self.special_ids[:4])
        if mine != theirs:
            raise ConfigError(
                "model.text",
                f"has special ids {theirs} (bos_id, pad_id, eos_id, unk_id), the tokenizer {self.path} has {mine}",
                "Give the tokenizer that the model was made for, or a new model these ids.",
            )
        self.check_mask(stem)

    def require_special_ids(self) -> None:
        """Raises DataError, which names them, where special words are lacking that every model needs."""
        lacking = [word for word, number in zip(_WORDS.values(), self.special_ids, strict=True) if number < 0]
        if lacking:
            raise DataError(
                f"The tokenizer {self.path} lacks {', '.join(lacking)}: it has the ids {tuple(self.special_ids)} "
                f"for {', '.join(_WORDS.values())} (-1: none).",
                "Train it again with these special tokens, or another one with `d2v tokenizer`.",
            )
        if len(set(self.special_ids)) < len(self.special_ids):
            raise DataError(
                f"The tokenizer {self.path} has one id for several of {', '.join(_WORDS.values())}: "
                f"{tuple(self.special_ids)}.",
                "Train it again with a special token for each.",
            )


def tokenizer_in(folder: Path) -> Path | None:
    """The file that names the tokenizer in a folder; None where there is none."""
    return next((path for name in _ORDER if (path := folder / name).is_file()), None)


def tokenizer_file(path: Path) -> Path:
    """The file that names a tokenizer, of a path that a user gave. Raises DataError for a folder without one."""
    if path.name.endswith(MERGES):
        return _partner(path, MERGES, VOCABULARY)
    if not path.is_dir():
        return path
    found = tokenizer_in(path)
    if found is None:
        raise DataError(f"{path} holds no tokenizer: no {PIECES}, {PUBLISHED} or {VOCABULARY}.", "Name its file.")
    return found


def wanted_tokenizer(named: str | None, of_shards: Path | None) -> Path | None:
    """The file of the tokenizer that a recipe names (`data.text.tokenizer`), else that of the shards. Raises
    DataError."""
    return tokenizer_file(Path(named)) if named else of_shards


def tokenizer_files(path: Path) -> list[Path]:
    """All files that ids depend on."""
    return [path, _partner(path, VOCABULARY, MERGES)] if path.name.endswith(VOCABULARY) else [path]


def _partner(path: Path, suffix: str, other: str) -> Path:
    # Libraries write them with a common prefix, too: name-vocab.json, name-merges.txt.
    return path.with_name(path.name.removesuffix(suffix) + other)


def tokenizer_sha256(path: Path) -> str:
    """What tells one tokenizer from another: SHA-256 of its file, or of what is known of several. Raises OSError."""
    first, *others = tokenizer_files(path)
    if not others:
        return file_sha256(first)
    known = [*map(file_sha256, (first, *others)), str(adds_space(first))]
    return hashlib.sha256("".join(known).encode()).hexdigest()


def adds_space(path: Path) -> bool | None:
    """Whether the settings beside a tokenizer say that a space is put before every text; None: they do not say."""
    value = settings_beside(path).get("add_prefix_space")
    return value if isinstance(value, bool) else None


def settings_beside(path: Path) -> dict[str, Any]:
    """What the JSON files beside a published tokenizer say of its special words. Raises DataError."""
    settings: dict[str, Any] = {}
    for file in (path.with_name(name) for name in ("special_tokens_map.json", SETTINGS)):
        if not file.is_file():
            continue
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}, beside a tokenizer, cannot be read: {error}.") from error
        settings |= told if isinstance(told, dict) else {}
    return settings


def copy_tokenizer(path: Path, out: Path) -> Path:
    """Copy a tokenizer into a folder, under the names by which it is found there; the file that names it."""
    files = tokenizer_files(path)
    names = (VOCABULARY, MERGES) if len(files) > 1 else (PUBLISHED if path.suffix == ".json" else PIECES,)
    for name in _ORDER[: _ORDER.index(names[0])] if out.resolve() != path.parent.resolve() else ():
        (out / name).unlink(missing_ok=True)  # of an earlier tokenizer: it would be found in place of this one
    beside = [file for file in map(path.with_name, _BESIDE) if path.suffix == ".json" and file.is_file()]
    for file, name in zip([*files, *beside], [*names, *(file.name for file in beside)], strict=True):
        with suppress(shutil.SameFileError):
            shutil.copyfile(file, out / name)
    return out / names[0]


def open_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer. Raises DataError."""
    # Both kinds import a library that only they need.
    if path.suffix == ".json":
        from d2v_scale.modalities.text.published import PublishedTokenizer

        return PublishedTokenizer(path)
    from d2v_scale.modalities.text.pieces import PieceTokenizer

    return PieceTokenizer(path)


def usable_tokenizer(path: Path) -> Path:
    """The file of a tokenizer to make shards or an index with. Raises DataError where no model could be trained on its
    ids, so that this is found out before anything is made."""
    file = tokenizer_file(path)
    open_tokenizer(file).require_special_ids()
    return file
