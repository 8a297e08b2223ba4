"""Send to MLflow what a run directory holds and MLflow does not have yet.

For runs on nodes without network, and for what an outage left behind. May be repeated: what is there is not added
twice. To another server than the run's own: set MLFLOW_TRACKING_URI; the whole run is sent then.

Before it says "complete" it asks the server for every point. Exit code 0: complete, or the run is in progress; 1: not
complete (the server does not answer, the run is in its trash, or values were refused); 2: no run directory.
"""

import argparse
import os
import sys
from pathlib import Path

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.errors import EXIT_BAD_INPUT
from d2v_scale.redaction import redact
from d2v_scale.tracking.follow import catch_up
from d2v_scale.tracking.mirror import REFUSED_FILE
from d2v_scale.tracking.mirror_state import shown_uri
from d2v_scale.tracking.record import METRICS_FILE


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="directories of runs")
    parser.add_argument(
        "--tracking_uri", help="default: MLFLOW_TRACKING_URI, else where the run is, else mlflow.db beside it"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Send, and say what happened."""
    options = make_parser().parse_args(arguments)
    if options.tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = options.tracking_uri
    failed = 0
    for run_dir in options.run_dirs:
        if not (run_dir / METRICS_FILE).exists():
            print(f"error: {run_dir} holds no {METRICS_FILE}. Give the directory of a run.", file=sys.stderr)
            return EXIT_BAD_INPUT
        try:
            mirror = catch_up(run_dir)
            missing = [] if mirror is None else mirror.missing()
        except Exception as error:
            print(redact(f"{run_dir}: not complete. {shown_uri(run_dir)} failed: {error}"), file=sys.stderr)
            failed = 1
            continue
        if mirror is None:
            print(f"{run_dir}: the run is in progress and sends its record itself.")
            continue
        place = f"MLflow run {mirror.state.run_id} at {mirror.state.tracking_uri}"
        if missing:
            print(f"{run_dir}: not complete. {place} lacks points of {', '.join(missing)}.", file=sys.stderr)
            failed = 1
        elif mirror.refused:
            print(
                f"{run_dir}: {mirror.refused} values were refused as invalid, {run_dir / REFUSED_FILE} names them; "
                f"{place} has the rest.",
                file=sys.stderr,
            )
            failed = 1
        else:
            print(f"{run_dir}: {place} is complete.")
    return failed
