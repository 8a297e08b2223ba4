"""Send to MLflow what a run directory holds and MLflow does not have yet.

For runs on nodes without network, and for what an outage left behind. May be repeated: what is there is not added
twice. To another server than the run's own: set MLFLOW_TRACKING_URI; the whole run is sent then.
"""

import argparse
import os
import sys
from pathlib import Path

from d2v_scale.errors import EXIT_BAD_INPUT
from d2v_scale.tracking.follow import catch_up
from d2v_scale.tracking.mirror_state import tracking_uri
from d2v_scale.tracking.record import METRICS_FILE


def main() -> int:
    """Parse arguments, send, say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+")
    parser.add_argument(
        "--tracking_uri", help="default: MLFLOW_TRACKING_URI, else where the run is, else mlflow.db beside it"
    )
    arguments = parser.parse_args()
    if arguments.tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = arguments.tracking_uri
    failed = 0
    for run_dir in arguments.run_dirs:
        if not (run_dir / METRICS_FILE).exists():
            print(f"error: {run_dir} holds no {METRICS_FILE}. Give the directory of a run.", file=sys.stderr)
            return EXIT_BAD_INPUT
        try:
            mirror = catch_up(run_dir)
        except Exception as error:
            print(f"{run_dir}: {tracking_uri(run_dir)} failed: {error}", file=sys.stderr)
            failed = 1
            continue
        if mirror is None:
            print(f"{run_dir}: the run is in progress and sends its record itself.")
        elif mirror.refused:
            print(f"{run_dir}: MLflow refused {mirror.refused} values as invalid; the rest is there.", file=sys.stderr)
            failed = 1
        else:
            print(f"{run_dir}: MLflow run {mirror.state.run_id} at {mirror.state.tracking_uri} is complete.")
    return failed


if __name__ == "__main__":
    sys.exit(main())
