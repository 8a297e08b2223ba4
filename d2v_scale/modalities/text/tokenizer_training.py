"""Training a sentencepiece model with the special ids that the models use."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2v_scale.errors import DataError, UserError
from d2v_scale.files import atomic_file


def train(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    kind: str = "bpe",
    character_coverage: float = 1.0,
    threads: int = 1,
    fewer: bool = False,
) -> None:
    """Write a model of `vocab_size` pieces to `path`. Ids: <s> 0, <pad> 1, </s> 2, <unk> 3; <mask> is `vocab_size`.

    Bytes stand in for characters outside the vocabulary, so that no text is lost. Where the texts are too few for that
    many pieces it raises DataError, or with `fewer` makes as many as there are.
    """
    import sentencepiece

    failed: list[UserError] = []
    lines = _remembering(failed, (line for text in texts for line in _lines(text)))
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError("There is no text to train a tokenizer on.", "Give documents that are not empty.")
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], lines),
                model_writer=stream,
                model_type=kind,
                vocab_size=vocab_size,
                hard_vocab_limit=not fewer,
                character_coverage=character_coverage,
                byte_fallback=True,
                bos_id=0,
                pad_id=1,
                eos_id=2,
                unk_id=3,
                bos_piece="<s>",
                pad_piece="<pad>",
                eos_piece="</s>",
                unk_piece="<unk>",
                num_threads=threads,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            if failed:  # the trainer wraps it in one of its own
                raise failed[0] from None
            reason = str(error).rstrip(".")
            raise DataError(f"No tokenizer of {vocab_size} pieces could be trained: {reason}.") from error


def _remembering(failed: list[UserError], lines: Iterator[str]) -> Iterator[str]:
    try:
        yield from lines
    except UserError as error:
        failed.append(error)
        raise


def _lines(text: str) -> list[str]:
    """Pieces of at most 4,000 bytes, which is what the trainer takes, cut at spaces."""
    lines = []
    for line in text.splitlines():
        while len(line) > 1000:
            cut = line.rfind(" ", 1, 1000)
            cut = 1000 if cut < 0 else cut
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line)
    return lines
