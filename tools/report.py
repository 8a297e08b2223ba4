"""Write one self-contained page about a run, or a comparison of several."""

import argparse
import sys
from pathlib import Path

from d2v_scale.errors import EXIT_BAD_INPUT
from d2v_scale.plots.report import write_report


def main() -> int:
    """Parse arguments, write the page, say where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default: report.html")
    arguments = parser.parse_args()
    try:
        path = write_report(arguments.runs, arguments.out)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
