"""Says what came out of a run: loss, k-NN accuracy before and after, and where everything is.

Usage: python tools/summarize.py RUN_DIR [--exported DIR]
"""

import argparse
import sys
from pathlib import Path

from d2v_scale.errors import EXIT_BAD_INPUT
from d2v_scale.tracking.names import by_stem
from d2v_scale.tracking.record import METRICS_FILE, read_records


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--exported", type=Path, help="where tools/export.py wrote the model")
    options = parser.parse_args(arguments)
    record = options.run_dir / METRICS_FILE
    if not record.is_file():
        print(f"error: {record} does not exist. Give the directory of a run.", file=sys.stderr)
        return EXIT_BAD_INPUT
    lines = read_records(options.run_dir)
    recorded = dict.fromkeys(name for line in lines for name in line)
    print(f"\n{options.run_dir}")
    shown = (
        ("loss", "loss           first {:.4f}, last {:.4f}"),
        ("knn_accuracy", "k-NN accuracy  before {:.3f}, after {:.3f}"),
    )
    for figure, text in shown:
        for whose, name in by_stem(recorded, figure).items():
            values = [line[name] for line in lines if name in line]
            print(f"  {text.format(values[0], values[-1])}{f' ({whose})' if whose else ''}")
    print(f"  checkpoints    {options.run_dir / 'checkpoints'}")
    if options.exported is not None:
        print(f"  exported       {options.exported}")
    print(f"  plots          {options.run_dir / 'plots'}")
    print(f"  compare runs   .venv/bin/mlflow ui --backend-store-uri sqlite:///{options.run_dir.parent / 'mlflow.db'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
