"""Train a sentencepiece tokenizer with the ids the models use: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last.

    d2v tokenizer '/shards/text-{000000..000099}.tar' tokenizer.model --vocab_size 32000
    d2v tokenizer corpus.txt tokenizer.model

The texts are WebDataset shards (`.txt` members), or files or a folder of them as `d2v shards text` takes them (.txt,
.jsonl or .json with `text`, tables with --columns). What cannot be read is left out, named and counted.
"""

import argparse
import os
import sys

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_file
from d2v_scale.errors import EXIT_BAD_INPUT, UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("source", help="shards of text, a file, or a folder of files")
    parser.add_argument("out", type=out_file, help="the model to write, such as tokenizer.model")
    parser.add_argument("--vocab_size", type=int, default=32000, help="pieces, without <mask>")
    parser.add_argument("--kind", choices=["bpe", "unigram"], default="bpe", help="how pieces are found")
    parser.add_argument("--character_coverage", type=float, default=0.9999, help="share of characters with a piece")
    parser.add_argument("--limit", type=int, default=2_000_000, help="documents to train on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="at once")
    parser.add_argument("--columns", help="columns of a table or keys of JSON, as `d2v shards text` takes them")
    parser.add_argument("--encoding", help="of files without a byte order mark, as latin-1; default: UTF-8")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Train, and say what a recipe needs to know of it."""
    options = make_parser().parse_args(arguments)
    from d2v_scale.conversion.tokenizer_texts import train_on

    try:
        texts, size = train_on(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if texts.left_out:
        print(f"{texts.left_out} of {texts.left_out + texts.used} documents were left out", file=sys.stderr)
    print(f"{options.out}: {size} pieces; model.text.vocab_size {size + 1}, mask_id {size}")
    return 0
