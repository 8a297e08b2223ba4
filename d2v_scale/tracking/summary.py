"""What a run directory says about its run: figures, recipe, incidents."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v_scale.data2vec.config import HealthConfig
from d2v_scale.process.status import Status, read_status
from d2v_scale.redaction import redact_values
from d2v_scale.spikes import LOSS, NORM
from d2v_scale.tracking.events import SPIKES_FILE
from d2v_scale.tracking.mirror_state import EVENTS_FILE
from d2v_scale.tracking.record import METRICS_FILE, SUPERSEDED_FILE, parse_lines, read_records
from d2v_scale.tracking.stragglers import STRAGGLERS_FILE
from d2v_scale.tracking.tracker import flatten
from d2v_scale.tracking.verdict import verdict


@dataclass(kw_only=True)
class Incident:
    """Something that interrupted or damaged a run."""

    time: float
    """Unix seconds; 0 if unknown."""
    step: int | None
    what: str


@dataclass(kw_only=True)
class RunSummary:
    """One run, read from its directory; nothing else is asked."""

    run_dir: Path
    name: str
    records: list[dict[str, Any]]
    recipe: dict[str, str]
    """Dotted keys of the resolved recipe."""
    tags: dict[str, str]
    outcome: str
    """From status.json; `in progress or lost` when there is none."""
    ended: str
    """The same as a sentence."""
    verdict: str
    """On its health: what it said itself when it ended, else what its record says now."""
    incidents: list[Incident]

    @classmethod
    def load(cls, run_dir: Path) -> "RunSummary":
        """Raises FileNotFoundError if the directory holds no record."""
        if not (run_dir / METRICS_FILE).exists():
            raise FileNotFoundError(f"{run_dir} holds no {METRICS_FILE}; give the directory of a run.")
        records = read_records(run_dir)
        events = list(_lines(run_dir / EVENTS_FILE))
        status, recipe = read_status(run_dir), _recipe(run_dir)
        tags = {
            key: value for event in events if event.get("event") == "tags" for key, value in event["values"].items()
        }
        return cls(
            run_dir=run_dir,
            name=run_dir.resolve().name,
            records=records,
            recipe=recipe,
            tags=tags,
            outcome="in progress or lost" if status is None else f"{status.outcome}: {status.reason}",
            ended=_sentence(status),
            verdict=(status.verdict if status else "") or verdict(records, _limits(recipe)),
            incidents=sorted(_incidents(run_dir, records, events, status), key=lambda incident: incident.time),
        )

    def first(self, name: str) -> float | None:
        """The first recorded value of a name."""
        return next((record[name] for record in self.records if name in record), None)

    def last(self, name: str) -> float | None:
        """The last recorded value of a name."""
        return next((record[name] for record in reversed(self.records) if name in record), None)

    def best(self, name: str) -> float | None:
        """The largest finite value of a name."""
        return max((r[name] for r in self.records if name in r and math.isfinite(r[name])), default=None)

    def median(self, name: str) -> float | None:
        """The median of a name's values after the first tenth of them (start-up)."""
        values = [record[name] for record in self.records if name in record]
        return statistics.median(values[len(values) // 10 :]) if values else None


def recipe_differences(summaries: Sequence[RunSummary]) -> dict[str, list[str | None]]:
    """Recipe keys in which the runs differ, each with every run's value (None: has no such key)."""
    keys = {key: None for summary in summaries for key in summary.recipe}
    rows = {key: [summary.recipe.get(key) for summary in summaries] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _recipe(run_dir: Path) -> dict[str, str]:
    import yaml

    path = run_dir / "recipe.yaml"
    content = yaml.safe_load(path.read_text()) if path.exists() else None
    return flatten(redact_values(content)) if isinstance(content, dict) else {}


def _sentence(status: Status | None) -> str:
    if status is None:
        return "In progress, or lost: it has not said how it ended."
    words = status.reason[:1].upper() + status.reason[1:]
    return words if status.outcome == "done" else f"{'Stopped' if status.outcome == 'requeue' else 'Failed'}: {words}"


def _limits(recipe: Mapping[str, str]) -> HealthConfig:
    """What the recipe says of a collapse."""
    limits = HealthConfig()
    for name in ("min_target_std", "min_prediction_std"):
        setattr(limits, name, float(recipe.get(f"objective.health.{name}", getattr(limits, name))))
    return limits


def _incidents(
    run_dir: Path, records: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], status: Status | None
) -> Iterator[Incident]:
    starts = [event["time"] for event in events if event.get("event") == "begin"]
    for start in starts[1:]:
        before = [record["step"] for record in records if record["time"] < start]
        yield Incident(time=start, step=max(before, default=0), what="restarted or resumed")
    superseded = run_dir / SUPERSEDED_FILE
    lost = [record["step"] for _, _, record in parse_lines(superseded.read_bytes())] if superseded.exists() else []
    if lost:
        yield Incident(
            time=0.0,
            step=min(lost),
            what=f"{len(set(lost))} recorded steps between {min(lost)} and {max(lost)} were done again",
        )
    for line in _lines(run_dir / "recipe_changes.jsonl"):
        changes = ", ".join(f"{key}: {change['from']} to {change['to']}" for key, change in line["changed"].items())
        yield Incident(time=line["time"], step=None, what=f"recipe changed: {changes}")
    for line in _lines(run_dir / SPIKES_FILE):
        of, answer = line.get("of", NORM), line["answer"]
        value = f"{of} {line['loss' if of == LOSS else 'norm']:.3g}, above {line['limit']:.3g}"
        done = (
            f"went back to step {line['rewound_to']}" if answer == "rewind" else {"skip": "skipped"}.get(answer, "end")
        )
        yield Incident(time=line["time"], step=line["step"], what=f"spike: {value}; {done}")
    for line in _lines(run_dir / STRAGGLERS_FILE):
        slow = f"rank {line['rank']} held the others up, waiting for {line['waits_for']}"
        yield Incident(time=line["time"], step=line["step"], what=slow)
    yield from _value_incidents(records)
    if status is not None and status.outcome == "failed":
        yield Incident(time=status.time, step=status.step, what=f"failed: {status.reason}")


def _value_incidents(records: Sequence[dict[str, Any]]) -> Iterator[Incident]:
    """Non-finite values (each name's first), and growth of counters of what was skipped or lost."""
    reported: set[str] = set()
    counters: dict[str, float] = {}
    for record in records:
        for name, value in record.items():
            if not math.isfinite(value) and name not in reported:
                reported.add(name)
                yield Incident(time=record["time"], step=record["step"], what=f"{name} is {value}")
            if (name.startswith("skipped") or name in ("data/lost", "memory_copies_lost")) and value > counters.get(
                name, 0.0
            ):
                yield Incident(time=record["time"], step=record["step"], what=f"{name} is now {value:g}")
                counters[name] = value


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # torn by a crash
                continue
