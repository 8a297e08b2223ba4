"""Is what an encoder makes of a word like what it makes of a picture of it? Pairs of modalities, with controls.

  d2v align runs/joint --data shards/joint
  d2v align runs/joint_seed1 runs/joint_seed2 runs/joint_seed3 --data shards/train --test shards/test
  d2v align runs/pictures runs/speech --data shards/pairs

Runs with the same stems are seeds of one another; runs with different ones are put together. A sample of the shards
has several members (KEY.png, KEY.flac, KEY.txt) and says its concept in KEY.json or KEY.cls; without either those that
share a picture, a recording or a caption are of one concept. Several samples of a concept are averaged. On held-out
concepts, by layer: retrieval in the same space, and through a ridge map fitted on training concepts, mutual k-NN,
debiased CKA and the gap between modalities. The layer that is judged is chosen on training concepts.

Beside them, always: encoders that are not trained, raw features, length alone, length removed, pairs shuffled, and
shuffled within categories. "above controls" needs the lower 95 % bound of the difference to each of them above 0,
over runs and concepts, corrected for the number of comparisons.
"""

import argparse
import sys
from pathlib import Path

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_file
from d2v_scale.errors import EXIT_BAD_INPUT, UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories, checkpoints, exported folders")
    parser.add_argument(
        "--data", required=True, help="training shards; a folder with train and test in it; or one set to be split"
    )
    parser.add_argument("--test", help="held-out shards, of other concepts")
    parser.add_argument("--held_out", type=float, default=0.25, help="share of the concepts held out of one set")
    parser.add_argument(
        "--concept",
        metavar="FIELD",
        help="what names a concept: label (.cls), key, text, a field of .json, or shared: samples with an equal "
        "picture, recording or caption are of one; default: concept of .json, else label, else shared",
    )
    parser.add_argument("--category", metavar="FIELD", help="what names its category, likewise")
    parser.add_argument("--weights", choices=["teacher", "student", "random"], default="teacher", help="whose")
    parser.add_argument("--tokenizer", type=Path, help="the text encoder's; default: that of its training data")
    parser.add_argument("--per_concept", type=int, default=8, help="at most so many samples of a concept")
    parser.add_argument("--random_seeds", type=int, default=5, help="encoders that are not trained, to compare with")
    parser.add_argument("--batch_size", type=int, default=64, help="samples at once")
    parser.add_argument(
        "--out",
        type=out_file,
        help="write the result here as JSON, the page beside it; default: align.json in the run",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the result and the page, and record them."""
    options = make_parser().parse_args(arguments)
    try:
        for name, least in (("per_concept", 1), ("batch_size", 1), ("random_seeds", 2)):
            if getattr(options, name) < least:
                raise UserError(f"--{name} is {getattr(options, name)}.", f"Give at least {least}.")
        if not 0 < options.held_out < 1:
            raise UserError(f"--held_out is {options.held_out}.", "Give a share between 0 and 1.")
        from d2v_scale.alignment.aligning import align
        from d2v_scale.alignment.recording import record, result_path, write
        from d2v_scale.alignment.table import lines
        from d2v_scale.plots.alignment import page
        from d2v_scale.tracking.follow import pass_on

        found = align(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print("\n".join(lines(found.result)))
    files = write(found.result, page(found), result_path(options.out, options.runs))
    for file in files:
        print(file)
    for run_dir in record(found.result, found.models, files):
        print(pass_on(run_dir))
    return 0
