"""What MLflow is to know of a run beside its metrics: one file of lines, written by all who have something to tell."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2v_scale.files import append_line
from d2v_scale.redaction import redact_values
from d2v_scale.tracking.mirror_state import EVENTS_FILE

SPIKES_FILE = "spikes.jsonl"
"""Beside it: the spikes of the run, and what was done about them (`running.spikes`)."""


def append_event(run_dir: Path, event: str, **content: Any) -> None:
    """One line in mlflow_events.jsonl: something other than a metric that MLflow is to know of the run."""
    append_line(run_dir / EVENTS_FILE, {"event": event, "time": time.time(), **redact_values(content)})


def log_evaluation(run_dir: Path, name: str, step: int, values: Mapping[str, float], params: Mapping[str, str]) -> None:
    """Record an evaluation of a run (a probe, say) as a nested MLflow run; sent by the run's mirror or `catch_up`."""
    append_event(run_dir, "evaluation", name=name, step=step, values=dict(values), params=dict(params))


def earlier_starts(run_dir: Path) -> int:
    """How often this run was started before: after a requeue, a stop or a crash, under Slurm or by hand."""
    return _milestones(run_dir).count("begin")


def has_ended(run_dir: Path) -> bool:
    """Whether the newest attempt has said how it ended."""
    return _milestones(run_dir)[-1:] == ["status"]


def _milestones(run_dir: Path) -> list[str]:
    path = run_dir / EVENTS_FILE
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [event for line in lines for event in ("begin", "status") if line.startswith(f'{{"event": "{event}"')]
