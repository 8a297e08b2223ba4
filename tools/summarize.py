"""Says what came out of a run: how it ended, loss, what it learned, its verdict, and where everything is.

Usage: python tools/summarize.py RUN_DIR [--exported DIR]
"""

import argparse
import sys
from pathlib import Path

from d2v_scale.errors import EXIT_BAD_INPUT
from d2v_scale.process.status import read_status
from d2v_scale.tracking.mirror_state import charts
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
    status = read_status(options.run_dir)
    print(f"\n{options.run_dir}")
    if status is not None:
        print(f"  {status.outcome:13s}  {status.reason}")
    shown = (
        ("loss", "loss           first {:.4f}, last {:.4f}"),
        ("knn_accuracy", "k-NN accuracy  before {:.3f}, after {:.3f}"),
    )
    for figure, text in shown:
        for whose, name in by_stem(recorded, figure).items():
            values = [line[name] for line in lines if name in line]
            print(f"  {text.format(values[0], values[-1])}{f' ({whose})' if whose else ''}")
    for name in dict.fromkeys(name for line in lines for name in line if name.startswith("test/")):
        tested = [line[name] for line in lines if name in line]
        if name != "test/samples":
            metric = name.removeprefix("test/")
            print(f"  {metric:13s}  before {tested[0]:.3f}, after {tested[-1]:.3f}, of held-out samples")
    if status is not None and status.verdict:
        print(f"  verdict        {status.verdict}")
    print(f"  checkpoints    {options.run_dir / 'checkpoints'}")
    if options.exported is not None:
        print(f"  exported       {options.exported}")
    print(f"  plots          {options.run_dir / 'plots'}")
    store = f"sqlite:///{options.run_dir.parent / 'mlflow.db'}"
    for line in charts(options.run_dir) or [f"mlflow ui --backend-store-uri {store}"]:
        print(f"  charts         {line.replace('mlflow ui', '.venv/bin/mlflow ui')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
