"""Train a sentencepiece tokenizer with the ids the models use: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last.

    python tools/train_tokenizer.py '/shards/text-{000000..000099}.tar' tokenizer.model --vocab_size 32000
    python tools/train_tokenizer.py corpus.txt tokenizer.model

The texts are WebDataset shards (`.txt` members), a .txt file or a .jsonl file with `text`.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import webdataset as wds

from d2v_scale.data import text, tokenizer
from d2v_scale.data.shard_set import expand
from d2v_scale.errors import EXIT_BAD_INPUT, DataError, UserError


def read_texts(source: str) -> Iterator[str]:
    """The documents of shards or of a file. Raises DataError."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        with path.open(encoding="utf-8") as stream:
            yield from (str(json.loads(line)["text"]) for line in stream if line.strip())
    elif path.suffix == ".txt" and path.is_file():
        with path.open(encoding="utf-8") as stream:
            yield from stream
    else:
        found = False
        for sample in wds.WebDataset(expand(source), shardshuffle=False):
            if "txt" in sample:
                found = True
                yield sample["txt"].decode("utf-8", errors="replace")
        if not found:
            raise DataError(f"The shards of {source!r} hold no .txt.", "Give shards of text.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="shards of text, a .txt file, or a .jsonl file")
    parser.add_argument("out", type=Path, help="the model to write, such as tokenizer.model")
    parser.add_argument("--vocab_size", type=int, default=32000, help="pieces, without <mask>")
    parser.add_argument("--kind", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument("--character_coverage", type=float, default=0.9999, help="share of characters with a piece")
    parser.add_argument("--limit", type=int, default=2_000_000, help="documents to train on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    try:
        tokenizer.train(
            islice(read_texts(arguments.source), arguments.limit),
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
    print(f"{arguments.out}: {pieces.size} pieces; model.text.vocab_size {pieces.size + 1}, mask_id {pieces.size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
