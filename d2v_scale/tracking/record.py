"""metrics.jsonl: the record of a run, one JSON object a line, written before anything else hears of a number.

A line has `step` (completed optimizer steps), `samples` (seen since the start of the job), `time` (Unix seconds),
`hours` (wall-clock hours of training, over all restarts) and named values. Training records carry `loss`; a step may
have more than one line (say, an evaluation). Non-finite values are written as NaN and Infinity, as Python's json does.

After a resume at step s the lines of later steps belong to an attempt that no longer counts: they move to
logs/metrics_superseded.jsonl, so that the record has neither gaps nor repeats and nothing is lost.
"""

import json
import os
import time as clock
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2v_scale.files import write_whole
from d2v_scale.tracking.mirror_state import MirrorState, state_locked

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "logs/metrics_superseded.jsonl"
AXES = ("step", "samples", "time", "hours")


class MetricsLog:
    """Appends records to run_dir/metrics.jsonl; every line reaches the operating system before `write` returns."""

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        """Continue the record at `resume_step` (None: a new run; lines found in the file are superseded)."""
        self.path = run_dir / METRICS_FILE
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = supersede(run_dir, after_step=resume_step)
        self._hours_before = max((float(r.get("hours", 0.0)) for r in kept), default=0.0)
        self._opened = clock.monotonic()
        self._resume_step = -1 if resume_step is None else resume_step
        self._written_at_resume = {
            name for record in kept if record["step"] == resume_step for name in record if name not in AXES
        }
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._unwritten = b""
        self.trouble: OSError | None = None
        """Why the newest lines are not in the file yet (a full disk, say). They are kept and tried again."""

    def write(self, step: int, samples: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Append one record and return it. Values may be 0-d tensors (read here, so a device is waited for here).

        Names that the step at which the run resumed has already are left out: an earlier attempt wrote them.
        """
        numbers = {name: float(value) for name, value in values.items()}
        if step <= self._resume_step:
            numbers = {name: value for name, value in numbers.items() if name not in self._written_at_resume}
        hours = self._hours_before + (clock.monotonic() - self._opened) / 3600
        record = {"step": int(step), "samples": int(samples), "time": clock.time(), "hours": round(hours, 7), **numbers}
        if numbers:
            self._unwritten += (json.dumps(record) + "\n").encode()
            self._drain()
        return record

    def _drain(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
            self.trouble = None
        except OSError as error:
            self.trouble = error

    def flush(self) -> None:
        """Force the record to disk; call it before a checkpoint is committed, so that no power loss leaves a gap."""
        self._drain()
        try:
            os.fsync(self._file)
        except OSError as error:  # network file systems may say only here that they are full
            self.trouble = error

    def close(self) -> None:
        """Flush and close; no more records."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1


def parse_lines(data: bytes) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, end, record) of every complete line; a torn or foreign line is passed over."""
    end = 0
    for line in data.splitlines(keepends=True):
        start, end = end, end + len(line)
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            yield start, end, record


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, in file order; empty when there are none yet."""
    path = run_dir / METRICS_FILE
    return [record for _, _, record in parse_lines(path.read_bytes())] if path.exists() else []


def supersede(run_dir: Path, after_step: int | None) -> list[dict[str, Any]]:
    """Move records of later steps than `after_step` (None: all) out of metrics.jsonl; return those that stay.

    Each moved record notes in `mirrored` the MLflow run that has it (or may have it) already, so that the mirror does
    not add a second point at the same step: MLflow cannot take a point back.
    """
    with state_locked(run_dir):
        return _supersede(run_dir, after_step)


def _supersede(run_dir: Path, after_step: int | None) -> list[dict[str, Any]]:
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    data = path.read_bytes()
    state = MirrorState.load(run_dir)
    kept: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    kept_lines: list[bytes] = []
    offset = parsed = 0
    for start, end, record in parse_lines(data):
        line = data[start:end]
        parsed = end
        if after_step is not None and record["step"] <= after_step:
            kept.append(record)
            kept_lines.append(line)
            offset += len(line) if end <= state.metrics_offset else 0
        elif end <= state.metrics_sending:
            moved.append({**record, "mirrored": state.run_id, "certain": end <= state.metrics_offset})
        else:
            moved.append({**record, "mirrored": None})
    if parsed == len(data) and not moved:
        return kept
    if moved:
        target = run_dir / SUPERSEDED_FILE
        target.parent.mkdir(exist_ok=True)
        with target.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in moved)
    state.generation += 1
    # The mirror's offset first: if we die before the rename it only sends again what it sent (which adds nothing).
    state.metrics_offset = state.metrics_sending = offset
    state.save(run_dir)
    write_whole(path, b"".join(kept_lines))
    return kept
