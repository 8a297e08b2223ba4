"""Draw the pictures of a run into its plots folder: curves, masks, what the teacher sees, neighbours, layers.

d2v draw runs/vit [--data 'test/*.tar']
d2v draw runs/joint --views

--views looks inside instead: what of a sample its representation rests on (parts are left out, one after the other),
and how far modalities lie apart, by layer; both beside an encoder of the same shape that was not trained.
"""

import argparse
import sys
from pathlib import Path

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.tracking.events import append_event


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory; its newest checkpoint is drawn")
    parser.add_argument("--data", help="shards; default: those of the recipe's evaluation")
    parser.add_argument("--samples", type=int, default=200, help="samples among which neighbours are looked for")
    parser.add_argument("--modality", metavar="STEM", help="this one alone, where the run has several")
    parser.add_argument("--views", action="store_true", help="what representations rest on, how modalities lie apart")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Draw, and print the files."""
    options = make_parser().parse_args(arguments)
    try:
        if options.samples < 1:
            raise UserError(f"--samples is {options.samples}.", "Give at least 1.")
        wanted = options.run, options.data, options.samples, options.modality
        if options.views:
            from d2v_scale.plots.views import draw_views

            paths, without = draw_views(*wanted)
        else:
            from d2v_scale.plots.of_run import draw

            paths, without = draw(*wanted)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for line in without:
        print(f"not drawn: {line}", file=sys.stderr)
    for path in paths:
        print(path)
        append_event(options.run, "artifact", path=str(path.relative_to(options.run)), folder="plots")
    return 0
