"""Write one self-contained page about a run, or a comparison of several."""

import argparse
import sys
from pathlib import Path

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_page
from d2v_scale.errors import EXIT_BAD_INPUT
from d2v_scale.plots.report import write_report


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument("--out", type=out_page, default=Path("report.html"), help="the page")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Write the page, and say where it is."""
    options = make_parser().parse_args(arguments)
    try:
        path = write_report(options.runs, options.out)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(path)
    return 0
