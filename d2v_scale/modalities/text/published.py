"""Tokenizers that Hugging Face's library reads: tokenizer.json, or vocab.json and merges.txt of a byte-level BPE."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2v_scale.errors import ConfigError, DataError
from d2v_scale.modalities.text.tokenizer import (
    SETTINGS,
    SpecialIds,
    Tokenizer,
    adds_space,
    settings_beside,
    tokenizer_files,
)
from d2v_scale.model.stem_config import TextStem

# Of each special id: how settings call its word, those that published encoders put there first, and usual words.
_CALLED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bos": (("cls_token", "bos_token"), ("<s>", "[CLS]")),
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "eos": (("sep_token", "eos_token"), ("</s>", "[SEP]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
}


class PublishedTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, which makes the ids that transformers makes of it."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for files that hold none."""
        super().__init__(path)
        settings = settings_beside(path)
        self.model: Any = _opened(path, settings)
        # Rows are cut and filled elsewhere, whatever the file was saved with.
        self.model.no_truncation()
        self.model.no_padding()
        self._words = {role: _word(self.model, settings, *called) for role, called in _CALLED.items()}
        self._size = max(self.model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special_ids)
        return str(self.model.decode([token for token in ids if token not in special], skip_special_tokens=True))

    def piece(self, number: int) -> str:
        """Bytes as the text that they are, a space as sentencepiece shows it; parts of a character as the library's
        name of them."""
        name = self.model.id_to_token(number)
        if name is None or number in self.special_ids:
            return name or f"<{number}>"
        text = self.model.decode([number], skip_special_tokens=False)
        return name if not text or "\ufffd" in text else str(text).replace(" ", "\u2581")

    @property
    def size(self) -> int:
        return self._size

    @property
    def special_ids(self) -> SpecialIds:
        found = {role: self.model.token_to_id(word) if word else None for role, word in self._words.items()}
        return SpecialIds(**{role: -1 if number is None else number for role, number in found.items()})

    @property
    def words(self) -> dict[str, str]:
        """Its special words, by what transformers calls them."""
        return {name: word for role, (names, _) in _CALLED.items() if (word := self._words[role]) for name in names}

    def check_mask(self, stem: TextStem) -> None:
        mask = self.special_ids.mask
        if stem.mask_id != mask:
            raise ConfigError(
                "model.text.mask_id",
                f"is {stem.mask_id}, <mask> of the tokenizer {self.path} is {mask}",
                "Give the tokenizer that the model was made for."
                if mask < 0
                else f"Set model.text.mask_id to {mask}, for a new model.",
            )
        if self.size > stem.vocab_size:
            raise ConfigError(
                "model.text.vocab_size",
                f"is {stem.vocab_size}, the tokenizer {self.path} has {self.size} ids",
                f"Set model.text.vocab_size to {self.size}.",
            )


def _opened(path: Path, settings: Mapping[str, Any]) -> Any:
    import tokenizers

    try:
        if len(tokenizer_files(path)) > 1:
            return _byte_level(path, settings)
        model = tokenizers.Tokenizer.from_file(str(path))
        held = json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            f"The tokenizer {path} cannot be read: {error}.",
            "Give a tokenizer.json, or a vocab.json with its merges.txt beside it.",
        ) from error
    said = adds_space(path)
    if held.get("type") == "ByteLevel" and said not in (None, held.get("add_prefix_space")):
        raise DataError(
            f"{path} and {SETTINGS} beside it differ in add_prefix_space: {held.get('add_prefix_space')} and {said}.",
            "Make them agree, as the model was trained.",
        )
    return model


def _byte_level(path: Path, settings: Mapping[str, Any]) -> Any:
    """As RoBERTa's classes read the two files."""
    import tokenizers

    vocabulary, merges = tokenizer_files(path)
    model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=bool(adds_space(path)))
    model.decoder = tokenizers.decoders.ByteLevel()
    found = (_word(model, settings, *called) for called in _CALLED.values())
    model.add_special_tokens([_added(word, settings) for word in found if word])
    return model


def _word(model: Any, settings: Mapping[str, Any], names: tuple[str, ...], usual: tuple[str, ...]) -> str | None:
    """The first that has an id: of what the settings name, then of what is usual."""
    given = (settings.get(name) for name in names)
    said = [word.get("content") if isinstance(word, dict) else word for word in given if word]
    return next((word for word in (*said, *usual) if model.token_to_id(word) is not None), None)


def _added(word: str, settings: Mapping[str, Any]) -> Any:
    """With what the settings say of the spaces around it."""
    import tokenizers

    known = (*(settings.get("added_tokens_decoder") or {}).values(), *settings.values())
    told = next((one for one in known if isinstance(one, dict) and one.get("content") == word), {})
    flags = {name: bool(told[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in told}
    return tokenizers.AddedToken(word, special=True, **flags)
