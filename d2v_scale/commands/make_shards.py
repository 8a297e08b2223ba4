"""Folders of images, recordings, text or arrays to WebDataset shards with an index; also the demo data.

    d2v shards demo [--modality vision|speech|text|video|joint|all] [OUT]
    d2v shards images SRC OUT      labels: the folder an image lies in
    d2v shards audio SRC OUT       any format soundfile reads, to 16 kHz mono FLAC
    d2v shards text SRC OUT        .txt files, or .jsonl and .json with `text` and perhaps `label`
    d2v shards text train.tsv OUT --columns sentence1,sentence2,label     a .tsv or .csv of texts
    d2v shards arrays SRC OUT      .npy, .npz and .csv: channels, then 1 to 4 axes; labels: folders
    d2v shards pairs TABLE OUT     a .csv or .tsv with columns image, audio, text, array, label: two parts or more a row
    d2v shards audio SRC OUT --transcripts FILE    lines `path below SRC, without ending<TAB>text`

Interrupted runs continue where they stopped. What training could not read is skipped, named and counted, so is what is
hidden. Text may be compressed (.gz, .bz2, .xz).
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from d2v_scale.answers.help_text import HelpFormatter, VerbParser
from d2v_scale.answers.outputs import out_folder
from d2v_scale.conversion import demo
from d2v_scale.data.config import VisionData
from d2v_scale.errors import EXIT_BAD_INPUT, UserError


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Of `images`."""
    _add_label(parser)
    parser.add_argument(
        "--max_pixels", type=int, default=VisionData.max_pixels, help="as data.vision.max_pixels of the recipe"
    )
    parser.add_argument("--resize", type=int, help="shrink to this shorter side, pixels")


def add_recording_options(parser: argparse.ArgumentParser) -> None:
    """Of `audio`."""
    _add_label(parser)
    parser.add_argument("--transcripts", type=Path, help="file with a line for each recording: name, text")
    _add_encoding(parser)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Of `text`."""
    _add_tokenizer(parser)
    parser.add_argument(
        "--documents", choices=["file", "paragraph", "line"], default="file", help="what is one document"
    )
    parser.add_argument("--ids", action="store_true", help="store token ids instead of text")
    parser.add_argument(
        "--columns", help="TEXT, TEXT,LABEL or TEXT,TEXT,LABEL: columns of a table (or numbers), keys of JSON"
    )
    parser.add_argument("--score", action="store_true", help="labels are numbers, not classes")
    _add_encoding(parser)


def add_array_options(parser: argparse.ArgumentParser) -> None:
    """Of `arrays`."""
    _add_label(parser)
    parser.add_argument("--key", help="of the array in each .npz; default: the only one")
    parser.add_argument("--columns", help="of tables, in this order: NAME,NAME or numbers from 1; default: all")
    parser.add_argument("--delimiter", help="of tables, or `tab`; default: what the first line has")
    parser.add_argument("--header", choices=["yes", "no"], help="whether a table's first line is names")


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Of `pairs`."""
    for part in ("image", "audio", "array", "text", "label"):
        held = {"text": "texts", "label": "labels"}.get(part, "paths, relative to TABLE")
        parser.add_argument(f"--{part}", metavar="COLUMN", help=f"of {held}, or its number from 1; default: {part}")
    parser.add_argument("--resize", type=int, help="shrink images to this shorter side, pixels")
    parser.add_argument(
        "--max_pixels", type=int, default=VisionData.max_pixels, help="as data.vision.max_pixels of the recipe"
    )
    _add_tokenizer(parser)
    parser.add_argument("--shared_captions", action="store_true", help="allow texts that another set in OUT has, too")
    _add_encoding(parser)


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "images": add_image_options,
    "audio": add_recording_options,
    "text": add_text_options,
    "arrays": add_array_options,
    "pairs": add_pair_options,
}
"""The options of each command beside those of all; what it does is a row of `conversion.making.COMMANDS`."""


def _add_label(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", help="pattern on the path below SRC whose first group is the label")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, help="sentencepiece model; without it one is trained")
    parser.add_argument("--vocab_size", type=int, default=16000, help="pieces of the trained tokenizer")
    parser.add_argument("--fewer_pieces", action="store_true", help="be content with fewer where the texts are too few")


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoding", help="of text without a byte order mark, as latin-1; default: UTF-8")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="real data from installed packages", formatter_class=HelpFormatter)
    command.add_argument("out", type=out_folder, nargs="?", default=Path(demo.ROOT), metavar="OUT", help="folder")
    command.add_argument("--modality", choices=[*demo.SETS, "all"], default="all", help="which sets")
    for name, add_its_own in OPTIONS.items():
        command = commands.add_parser(name, help=f"shards from {name}", formatter_class=HelpFormatter)
        of_table = name == "pairs"
        what = "a .csv or .tsv" if of_table else "a folder, or files of text"
        command.add_argument("source", type=Path, metavar="TABLE" if of_table else "SRC", help=what)
        command.add_argument("out", type=out_folder, metavar="OUT", help="folder of the shards")
        command.add_argument("--prefix", default="train", help="shards are PREFIX-000000.tar and so on")
        command.add_argument("--per_shard", type=int, default=1000, help="samples per shard")
        command.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at once")
        command.add_argument("--max_bad", type=float, default=0.01, help="share of bad files that is an error")
        if not of_table:
            command.add_argument("--match", help="take only files whose path below SRC matches this pattern")
        add_its_own(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Convert, and say how much."""
    options = make_parser().parse_args(arguments)
    from d2v_scale.conversion.making import convert, make_demo
    from d2v_scale.conversion.pairs import convert_pairs
    from d2v_scale.shards.shard_set import INDEX_SUFFIX

    try:
        if options.command == "demo":
            make_demo(options)
            return 0
        index, skipped = (convert_pairs if options.command == "pairs" else convert)(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    size = sum(shard.bytes for shard in index.shards)
    print(
        f"{len(index.shards)} shards, {index.samples} samples, {size / 1e6:.1f} MB, {skipped} skipped: "
        f"{options.out / (options.prefix + INDEX_SUFFIX)}"
    )
    return 0
