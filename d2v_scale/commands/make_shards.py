"""Folders of images, recordings, text or arrays to WebDataset shards with an index; also the demo data.

    d2v shards SRC OUT             recognises what SRC is, says so, and does the right one of:

    d2v shards demo [--modality vision|speech|text|video|joint|all] [OUT]
    d2v shards images SRC OUT      labels: the folder an image lies in
    d2v shards audio SRC OUT       any format soundfile reads, to 16 kHz mono FLAC
    d2v shards text SRC OUT        .txt files, or .jsonl and .json with `text` and perhaps `label`
    d2v shards text train.tsv OUT --columns sentence1,sentence2,label     a .tsv or .csv of texts
    d2v shards arrays SRC OUT      .npy, .npz and .csv: channels, then 1 to 4 axes; labels: folders
    d2v shards pairs TABLE OUT     a .csv or .tsv: two or more of image, audio, text, array; label, concept, category
    d2v shards dataset SRC OUT     Parquet, and folders of Hugging Face `datasets`; columns by type and name
    d2v shards audio SRC OUT --transcripts FILE    lines `path below SRC, without ending<TAB>text`

`d2v shards SRC OUT` takes the options of what it recognises; a SRC with folders or tables train and test becomes a set
of each. `--part K/N` writes every N-th shard, from the K-th (0 to N-1), so that N programs share the work; the last of
them writes the index. Interrupted runs continue where they stopped. What training could not read is skipped, named and
counted, so is what is hidden. Text may be compressed (.gz, .bz2, .xz).
"""

import argparse
import difflib
import os
import re
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
    help_of_transcripts = (
        "file with a line for each recording: name, text; or a folder with *.trans.txt, as LibriSpeech's"
    )
    parser.add_argument("--transcripts", type=Path, help=help_of_transcripts)

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
    for part in ("image", "audio", "array", "text", "label", "concept", "category"):
        held = "paths, relative to TABLE"
        if part in ("text", "label", "concept", "category"):
            held = {"concept": "what a sample is of (`d2v align`)", "category": "its kind"}.get(part, f"{part}s")
        parser.add_argument(f"--{part}", metavar="COLUMN", help=f"of {held}, or its number from 1; default: {part}")
    parser.add_argument("--resize", type=int, help="shrink images to this shorter side, pixels")
    parser.add_argument(
        "--max_pixels", type=int, default=VisionData.max_pixels, help="as data.vision.max_pixels of the recipe"
    )
    _add_tokenizer(parser)
    parser.add_argument("--complete", action="store_true", help="leave rows out that lack a part, and name them")
    parser.add_argument("--shared_captions", action="store_true", help="allow texts that another set in OUT has, too")
    _add_encoding(parser)


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """Of `dataset`."""
    for part in ("image", "audio", "array", "text", "label"):
        parser.add_argument(f"--{part}", metavar="COLUMN", help="default: by type and name of the columns")
    parser.add_argument("--second", metavar="COLUMN", help="of the other text of a pair of texts")
    parser.add_argument("--pairs", action="store_true", help="a text beside a recording is trained on, too")
    parser.add_argument("--resize", type=int, help="shrink images to this shorter side, pixels")
    parser.add_argument(
        "--max_pixels", type=int, default=VisionData.max_pixels, help="as data.vision.max_pixels of the recipe"
    )
    _add_tokenizer(parser)
    parser.add_argument("--complete", action="store_true", help="leave rows out that lack a part, and name them")
    parser.add_argument("--shared_captions", action="store_true", help="allow texts that another set in OUT has, too")


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "images": add_image_options,
    "audio": add_recording_options,
    "text": add_text_options,
    "arrays": add_array_options,
    "pairs": add_pair_options,
    "dataset": add_row_options,
}
"""The options of each command beside those of all; what it does is a row of `conversion.making.COMMANDS`."""
COMMANDS = ("demo", *OPTIONS)


def _add_label(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", help="pattern on the path below SRC, its first group is the label; none: no labels")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help=".model, .json, or its folder; without it one is trained",
    )
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
        command.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="at once")
        command.add_argument("--part", type=part, default="0/1", metavar="K/N", help="one of N parts of the work")
        command.add_argument("--max_bad", type=float, default=0.01, help="share of bad files that is an error")
        if not of_table:
            command.add_argument("--match", help="take only files whose path below SRC matches this pattern")
        add_its_own(command)
    return parser


def part(text: str) -> tuple[int, int]:
    """K/N: K from 0 to N-1."""
    matched = re.fullmatch(r"(\d+)/(\d+)", text)
    if matched is None or int(matched[1]) >= int(matched[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: write K/N, with K from 0 to N-1")
    return int(matched[1]), int(matched[2])


def main(arguments: list[str] | None = None) -> int:
    """Convert, and say how much."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            return _convert_recognised(given)
        return _convert(make_parser().parse_args(given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _convert_recognised(given: list[str]) -> int:
    """Recognise SRC, say what it is, convert it."""
    from d2v_scale.conversion.file_kinds import OVERRIDES
    from d2v_scale.conversion.recognising_files import recognise

    source, *rest = given
    if not Path(source).exists() and (near := difflib.get_close_matches(source, COMMANDS, n=1, cutoff=0.8)):
        raise UserError(f"{source!r} does not exist, and is no command.", f"Did you mean {near[0]!r}?")
    if not rest or rest[0].startswith("-"):
        raise UserError(f"Where the shards of {source} go is not said.", "Write d2v shards SRC OUT [OPTIONS].")
    out, *more = rest
    sets = recognise(Path(source))
    parsed = [make_parser().parse_args(one.arguments(out, more)) for one in sets]
    files = {(one.source, getattr(one, "match", None)) for one in parsed}
    if min(len(files), len({one.prefix for one in parsed})) < len(sets):
        raise UserError(
            f"{source} is several sets, and --prefix or --match would make all of them one: the last would be left.",
            "Leave it out, or convert one at a time: " + "; ".join(one.typed(out) for one in sets) + ".",
        )
    if len(sets) > 1 and parsed[0].part[1] > 1 and "none" not in sets[0].options:
        shown = "; then ".join(one.typed(out, more) for one in sets)
        raise UserError(
            f"{source} is several sets, and all have the classes of the first.", f"Make that first: {shown}."
        )
    for one in sets:
        print(f"{source} is recognised as {one.says}: {one.typed(out, more)}", file=sys.stderr)
    print(f"Otherwise say what it is: {OVERRIDES}", file=sys.stderr)
    return max(map(_convert, parsed))


def _convert(options: argparse.Namespace) -> int:
    from d2v_scale.conversion.making import convert, make_demo
    from d2v_scale.conversion.new_sets import NewSet
    from d2v_scale.conversion.pairs import convert_pairs
    from d2v_scale.conversion.row_sets import convert_rows

    if options.command == "demo":
        make_demo(options.modality, options.out)
        return 0
    new = NewSet(options.out, options.prefix, options.per_shard, options.processes, options.max_bad, options.part)
    made = {"pairs": convert_pairs, "dataset": convert_rows}.get(options.command, convert)(options, new)
    if made is None:
        return 0
    index, skipped = made
    size = sum(shard.bytes for shard in index.shards)
    print(
        f"{len(index.shards)} shards, {index.samples} samples, {size / 1e6:.1f} MB, {skipped} skipped: {new.index_file}"
    )
    return 0
