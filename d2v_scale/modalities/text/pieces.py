"""Sentencepiece models as tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2v_scale.errors import ConfigError, DataError
from d2v_scale.modalities.text.tokenizer import SpecialIds, Tokenizer
from d2v_scale.model.stem_config import TextStem


class PieceTokenizer(Tokenizer):
    """A sentencepiece model; <mask> is the first id after its pieces, or a later one."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for a file that is no such model."""
        import sentencepiece

        super().__init__(path)
        try:
            self.model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"The tokenizer {path} cannot be read: {error}.",
                "Train one with `d2v tokenizer`, or give a published tokenizer.json.",
            ) from error

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.model.decode([token for token in ids if token < self.size]))

    def piece(self, number: int) -> str:
        return str(self.model.id_to_piece(number)) if number < self.size else "<mask>"

    @property
    def size(self) -> int:
        return int(self.model.vocab_size())

    @property
    def special_ids(self) -> SpecialIds:
        model = self.model
        return SpecialIds(model.bos_id(), model.pad_id(), model.eos_id(), model.unk_id(), self.size)

    def check_mask(self, stem: TextStem) -> None:
        if not self.size <= stem.mask_id < stem.vocab_size:
            raise ConfigError(
                "model.text.vocab_size",
                f"is {stem.vocab_size} with <mask> at {stem.mask_id}, the tokenizer has {self.size} pieces",
                f"Set model.text.vocab_size to {self.size + 1} and model.text.mask_id to {self.size}.",
            )
