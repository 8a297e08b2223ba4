"""Index existing WebDataset tars, so that training on them is planned and resumed exactly.

    d2v index '/shards/in1k-{000000..001281}.tar' --modality vision
    d2v index '/shards/eeg-*.tar' --modality array
    d2v index '/shards/pairs-*.tar' --modality vision,speech,text --tokenizer t.model
    d2v index 'pipe:ssh host cat /shards/a-{000000..000099}.tar' --modality speech --out indexes/
    d2v index 's3://bucket/a-{000000..000099}.tar' --modality text --tokenizer t.model --out indexes/

Nothing is written to the shards. Every sample is decoded as training decodes it: what is damaged is named, and its
samples count as lost in training. Labels that are no class numbers are of no matter to pretraining, and counted.
Interrupted runs continue where they stopped, and shards that have not changed are not read again; those of a `pipe:`
command and of servers that do not tell always are. Train with `--data OUT/NAME.index.json`.
"""

import argparse
import os
import sys
from pathlib import Path

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_folder
from d2v_scale.data.config import VisionData
from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.shards.content import WORDS


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("shards", help="path with {000000..000099}, glob, directory, `pipe:` command or URL")
    parser.add_argument(
        "--modality",
        metavar="|".join(WORDS),
        help="what the shards hold, several separated by commas; default: as the first sample looks",
    )
    parser.add_argument("--out", type=out_folder, help="directory of the index; default: beside the shards")
    parser.add_argument("--name", help="the index is NAME.index.json; default: what the shards are called")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="of text: .model, .json, or its folder",
    )
    parser.add_argument("--key", help="of the array in each .npz; default: the only one")
    parser.add_argument("--classes", help="names of the labels, separated by commas; default: their numbers")
    parser.add_argument(
        "--max_pixels", type=int, default=VisionData.max_pixels, help="as data.vision.max_pixels of the recipe"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at once")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Index, and say what is damaged."""
    options = make_parser().parse_args(arguments)
    from d2v_scale.conversion.indexing import make_index

    try:
        index, target = make_index(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for shard in index.shards:
        for damage in shard.damage:
            print(f"damaged: {shard.path}: {damage}", file=sys.stderr)
        for line in shard.passed_over:
            print(f"passed over: {shard.path}: {line}")
    damaged, lost = sum(bool(shard.damage) for shard in index.shards), sum(shard.lost for shard in index.shards)
    told = f", {lost} of them lost" if lost else ""
    print(f"{len(index.shards)} shards, {index.samples} samples{told}, {damaged} damaged shards: {target}")
    return 0
