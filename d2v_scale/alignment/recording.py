"""Where the result of an alignment goes: into a file, and beside every run into its record, which MLflow follows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2v_scale.alignment.models import Model
from d2v_scale.alignment.result import scores_of
from d2v_scale.files import write_whole
from d2v_scale.tracking.events import append_event, log_evaluation
from d2v_scale.tracking.record import METRICS_FILE

FOLDER = "align"


def result_path(wanted: Path | None, runs: Sequence[str]) -> Path:
    """Where the JSON goes: into the first run's folder, or here where that is no run."""
    if wanted is not None:
        return wanted
    first = Path(runs[0])
    return first / FOLDER / "align.json" if (first / METRICS_FILE).exists() else Path("align.json")


def write(result: dict[str, Any], page: str, out: Path) -> list[Path]:
    """Write the result and the page beside it; returns both files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out, out.with_suffix(".html")]
    write_whole(files[0], json.dumps(result, indent=1) + "\n")
    write_whole(files[1], page)
    return files


def record(result: dict[str, Any], models: Sequence[Model], files: Sequence[Path]) -> list[Path]:
    """Enter the scores into the record of every run that is still there, as an evaluation beside it, with a copy of the
    files; returns the runs."""
    recorded = []
    for model in models:
        for source in model.sources:
            run_dir = source.run_dir
            if run_dir is None or not (run_dir / METRICS_FILE).exists():
                continue
            params = {"weights": str(result["weights"]), "task": "align", "data": str(result["data"]["held_out"])}
            log_evaluation(run_dir, f"align {result['weights']}", source.step, scores_of(result), params)
            (run_dir / FOLDER).mkdir(exist_ok=True)
            for file in files:
                copy = run_dir / FOLDER / file.name
                if copy.resolve() != file.resolve():
                    write_whole(copy, file.read_bytes())
                append_event(run_dir, "artifact", path=str(copy.relative_to(run_dir)), folder=FOLDER)
            recorded.append(run_dir)
    return recorded
