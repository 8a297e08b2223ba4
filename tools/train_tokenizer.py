"""Train a sentencepiece tokenizer with the ids the models use: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last.

    python tools/train_tokenizer.py '/shards/text-{000000..000099}.tar' tokenizer.model --vocab_size 32000
    python tools/train_tokenizer.py corpus.txt tokenizer.model

The texts are WebDataset shards (`.txt` members), or files or a folder of them as tools/make_shards.py takes them (.txt,
.jsonl or .json with `text`, tables with --columns). What cannot be read is left out, named and counted.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import webdataset as wds

from d2v_scale.data import text, text_files, tokenizer
from d2v_scale.data.folders import find_files
from d2v_scale.data.shard_set import expand
from d2v_scale.data.tables import Columns
from d2v_scale.data.text_files import Document, Reading
from d2v_scale.errors import EXIT_BAD_INPUT, DataError, UserError

_NAMED = 20


class Texts:
    """The texts of a source, and a count of its documents that are left out."""

    def __init__(self, source: str, reading: Reading) -> None:
        self._source = source
        self._reading = reading
        self.used = 0
        self.left_out = 0

    def __iter__(self) -> Iterator[str]:
        """Raises DataError where there is nothing of the kind."""
        for document in self._documents():
            if document.fault is None:
                self.used += 1
                yield from document.texts
                continue
            self.left_out += 1
            if self.left_out <= _NAMED:
                print(f"left out {document.place}: {document.fault}", file=sys.stderr)

    def _documents(self) -> Iterator[Document]:
        path = Path(self._source)
        holds_shards = path.is_dir() and any(path.glob("*.tar"))
        if path.exists() and not holds_shards and (path.is_dir() or text_files.kind_of(path) in text_files.EXTENSIONS):
            found = find_files(path, text_files.EXTENSIONS, extension_of=text_files.kind_of)
            if found.left_out():
                print(found.left_out(), file=sys.stderr)
            return text_files.documents(found.files, self._reading)
        return self._of_shards()

    def _of_shards(self) -> Iterator[Document]:
        seen: Counter[str] = Counter()
        damage: list[Document] = []

        def go_on(error: Exception) -> bool:
            damage.append(Document("", place=self._source, fault=f"{type(error).__name__}: {error}"))
            return True

        for sample in wds.WebDataset(expand(self._source), shardshuffle=False, handler=go_on, empty_check=False):
            yield from damage
            damage.clear()
            seen.update(sample.keys())
            place = f"{sample['__url__']}: {sample['__key__']}"
            for extension in ("txt", "txt2"):
                if extension in sample:
                    yield text_files.checked(sample[extension], place)
        yield from damage
        if not seen["txt"]:
            raise DataError(f"The shards of {self._source!r} hold no .txt.", "Give shards of text.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="shards of text, a file, or a folder of files")
    parser.add_argument("out", type=Path, help="the model to write, such as tokenizer.model")
    parser.add_argument("--vocab_size", type=int, default=32000, help="pieces, without <mask>")
    parser.add_argument("--kind", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument("--character_coverage", type=float, default=0.9999, help="share of characters with a piece")
    parser.add_argument("--limit", type=int, default=2_000_000, help="documents to train on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--columns", help="columns of a table or keys of JSON, as tools/make_shards.py takes them")
    parser.add_argument("--encoding", help="of files without a byte order mark, as latin-1; default: UTF-8")
    arguments = parser.parse_args()
    try:
        columns = Columns.parse(arguments.columns) if arguments.columns else None
        texts = Texts(arguments.source, Reading(split="line", columns=columns, encoding=arguments.encoding))
        tokenizer.train(
            islice(texts, arguments.limit),
            arguments.out,
            vocab_size=arguments.vocab_size,
            kind=arguments.kind,
            character_coverage=arguments.character_coverage,
            threads=arguments.threads,
        )
        pieces = text.Tokenizer(arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if texts.left_out:
        print(f"{texts.left_out} of {texts.left_out + texts.used} documents were left out", file=sys.stderr)
    print(f"{arguments.out}: {pieces.size} pieces; model.text.vocab_size {pieces.size + 1}, mask_id {pieces.size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
