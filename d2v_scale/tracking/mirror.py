"""The MLflow mirror: a process of its own that follows a run directory and repeats it to a tracking server.

It reads only files (metrics.jsonl, mlflow_events.jsonl) and remembers its position in mlflow_run.json, so training
never waits for it, an outage loses nothing, and tools/sync_mlflow.py can finish its work on another machine. Sending
is idempotent: MLflow identifies a point by (name, time, step, value), and a repeated point adds nothing.

A process instead of a thread because creating the sqlite store takes seconds of pure Python, which in a thread would
slow the training steps down.
"""

import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d2v_scale.tracking.mirror_state import EVENTS_FILE, MirrorState, state_locked, tracking_uri
from d2v_scale.tracking.record import AXES, METRICS_FILE, SUPERSEDED_FILE, parse_lines
from d2v_scale.tracking.system import node_of, system_files

POINTS_PER_CALL = 1000
_ENOUGH = POINTS_PER_CALL - 100
"""Points to wait for before a call: another record might no longer fit."""
END_OF_RUN = {"done": "FINISHED", "requeue": "SCHEDULED", "failed": "FAILED"}
_PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Outdated(Exception):
    """The run was resumed while this mirror, of the attempt before, was still sending."""


class NotStored(Exception):
    """Artifacts that their store does not take; everything else has been sent."""


class Mirror:
    """Repeats one run directory to MLflow. `step()` sends what is there; it raises what MLflow raises."""

    def __init__(self, run_dir: Path) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.run_dir = run_dir
        begin = next((e for _, _, e in _events(_read_from(run_dir / EVENTS_FILE, 0)) if e["event"] == "begin"), {})
        self.experiment = begin.get("experiment", "d2v_scale")
        self.run_name = begin.get("run_name") or run_dir.resolve().name
        uri = tracking_uri(run_dir)
        self.state = MirrorState.load(run_dir)
        if self.state.tracking_uri != uri:
            key = self.state.job_key or uuid.uuid4().hex
            self.state = MirrorState(tracking_uri=uri, job_key=key, generation=self.state.generation)
            self.state.save(run_dir)
        if self.state.metrics_offset > _size(run_dir / METRICS_FILE):
            # Of a file that is no more; what is sent a second time adds nothing.
            self.state.metrics_offset = self.state.metrics_sending = 0
        self._make_client: Callable[[], MlflowClient] = lambda: MlflowClient(tracking_uri=uri)
        self._client: MlflowClient | None = None
        self._already: dict[int, set[str]] = {}
        self._connected = False
        self.refused = 0
        """Points and events that MLflow declared invalid; they stay in the files."""

    def _save(self) -> None:
        """Remember the position, unless a new attempt of the run has rewritten what the position is in."""
        with state_locked(self.run_dir):
            self._check_generation()
            self.state.save(self.run_dir)

    def _check_generation(self) -> None:
        if MirrorState.load(self.run_dir).generation != self.state.generation:
            raise Outdated

    def pending(self) -> int:
        """Bytes of complete lines not yet sent, and artifacts not yet stored."""
        offsets = {path: self.state.system_offsets.get(path.name, 0) for path in system_files(self.run_dir)}
        offsets[self.run_dir / METRICS_FILE] = self.state.metrics_offset
        offsets[self.run_dir / EVENTS_FILE] = self.state.events_offset
        unsent = sum(_complete(_read_from(path, offset)) for path, offset in offsets.items())
        return unsent + len(self.state.artifacts_waiting)

    def step(self) -> None:
        """Send everything that is complete in the files now."""
        self._check_generation()
        if not self.pending():
            return
        try:
            self._send()
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            # Another store answers at the same address: the run is unknown there, so it gets all of it.
            state = self.state
            self.state = MirrorState(
                tracking_uri=state.tracking_uri, job_key=state.job_key, generation=state.generation
            )
            self._connected = False
            self._send()

    def _send(self) -> None:
        if not self._connected:
            self._client = self._client or self._make_client()
            self._ensure_run()
            self._load_superseded()
            self._connected = True
        self._send_events(final=False)
        self._send_metrics()
        self._send_system()
        self._send_events(final=True)
        self._store_artifacts()  # last: their store may be another than the records' and out of reach

    # The run

    def _ensure_run(self) -> None:
        assert self._client is not None
        if self.state.run_id:
            self._client.get_run(self.state.run_id)
            return
        experiment_id = self._ensure_experiment()
        self.state.run_id = self._run_with_key(experiment_id, self.state.job_key, self.run_name, {})
        self._save()

    def _run_with_key(self, experiment_id: str, key: str, name: str, tags: dict[str, str]) -> str:
        """The id of the run tagged with our key; made if there is none (the answer to its creation may get lost)."""
        assert self._client is not None
        found = self._client.search_runs([experiment_id], f"tags.`d2v.job` = '{key}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = tags | {"d2v.job": key, "mlflow.source.type": "JOB", "mlflow.source.name": "d2v_scale"}
        return self._client.create_run(experiment_id, tags=tags, run_name=name).info.run_id

    def _ensure_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        experiment = self._client.get_experiment_by_name(self.experiment)
        if experiment is not None:
            return experiment.experiment_id
        local = self.state.tracking_uri.startswith("sqlite:")
        place = (self.run_dir.resolve().parent / "mlflow_artifacts").as_uri() if local else None
        # The tag opens the experiment in the interface's view for model training.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return self._client.create_experiment(self.experiment, artifact_location=place, tags=tags)
        except MlflowException:  # another run created it at the same moment
            experiment = self._client.get_experiment_by_name(self.experiment)
            if experiment is None:
                raise
            return experiment.experiment_id

    # Metrics

    def _load_superseded(self) -> None:
        """What MLflow holds of earlier attempts: those (step, name) are not sent a second time."""
        self._already = {}
        path = self.run_dir / SUPERSEDED_FILE
        unsure: list[dict[str, Any]] = []
        for _, _, record in parse_lines(path.read_bytes()) if path.exists() else ():
            if record.get("mirrored") == self.state.run_id:
                if not record.get("certain", True):
                    unsure.append(record)
                self._already.setdefault(record["step"], set()).update(record)
        self._log_points([point for record in unsure for point in _points(record, {})])

    def _send_metrics(self) -> None:
        while (chunk := self._next_chunk()) is not None:
            points, end = chunk
            self.state.metrics_sending = end
            self._save()
            self._log_points(points)
            self.state.metrics_offset = end
            self._save()

    def _send_system(self) -> None:
        """What every node's monitor wrote, under the names that MLflow shows as system metrics; the nodes together."""
        points: list[Any] = []
        offsets = self.state.system_offsets
        for path in system_files(self.run_dir):
            begin = offsets.get(path.name, 0)
            prefix = f"system/{node_of(path)}/"
            data = _read_from(path, begin)
            for _, end, record in parse_lines(data):
                named = {key if key in AXES else prefix + key: value for key, value in record.items()}
                points += _points(named, {})
                offsets = {**offsets, path.name: begin + end}
                if len(points) >= _ENOUGH:
                    self._log_system(points, offsets)
                    points = []
            offsets = {**offsets, path.name: begin + _complete(data)}
        if offsets != self.state.system_offsets:
            self._log_system(points, offsets)

    def _log_system(self, points: list[Any], offsets: dict[str, int]) -> None:
        self._log_points(points)
        self.state.system_offsets = offsets
        self._save()

    def _next_chunk(self) -> tuple[list[Any], int] | None:
        """Points of the next lines, up to about one call's worth, and the offset where they end."""
        points: list[Any] = []
        end = begin = self.state.metrics_offset
        data = _read_from(self.run_dir / METRICS_FILE, begin)
        for _, line_end, record in parse_lines(data):
            points += _points(record, self._already)
            end = begin + line_end
            if len(points) >= _ENOUGH:
                break
        else:
            end = begin + _complete(data)
        return (points, end) if end > begin else None

    def _log_points(self, points: list[Any]) -> None:
        for start in range(0, len(points), POINTS_PER_CALL):
            self._log_batch(points[start : start + POINTS_PER_CALL])

    def _log_batch(self, points: list[Any]) -> None:
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        try:
            self._client.log_batch(self.state.run_id, metrics=points, synchronous=True)
        except MlflowException as error:
            if error.error_code not in _PERMANENT:
                raise
            if len(points) == 1:
                self.refused += 1
                return
            half = len(points) // 2
            self._log_batch(points[:half])
            self._log_batch(points[half:])

    # Params, tags, artifacts, status

    def _send_events(self, final: bool) -> None:
        """Do the events in order. A status that ends the run waits until all metrics are sent (`final`)."""
        from mlflow.exceptions import MlflowException

        begin = self.state.events_offset
        data = _read_from(self.run_dir / EVENTS_FILE, begin)
        for start, end, event in _events(data):
            if event["event"] == "status" and event["status"] in END_OF_RUN and not final:
                return
            try:
                self._apply(event)
            except MlflowException as error:
                if error.error_code not in _PERMANENT:
                    raise
                self.refused += 1
                print(f"refused at {begin + start}: {event} {error}", file=sys.stderr, flush=True)
            self.state.events_offset = begin + end
            self._save()
        if self.state.events_offset != begin + _complete(data):  # the last line is none
            self.state.events_offset = begin + _complete(data)
            self._save()

    def _store_artifacts(self) -> None:
        """Store the artifacts that wait, up to one that fails; NotStored names it and says how many wait after that.

        A store that hangs costs one timeout a turn, then, and the next turn begins with another artifact.
        """
        for event in list(self.state.artifacts_waiting):
            try:
                self._store(event)
            except Exception as error:  # a store's client raises what it likes: OSError, ImportError, no credentials
                code = getattr(error, "error_code", "")
                if code == "RESOURCE_DOES_NOT_EXIST":
                    raise
                if code not in _PERMANENT:
                    others = [one for one in self.state.artifacts_waiting if one is not event]
                    self.state.artifacts_waiting = [*others, event]
                    self._save()
                    reason = f"not the artifact {event['path']} ({type(error).__name__}: {error})"
                    raise NotStored(reason + f", and {len(others)} more wait" * bool(others)) from error
                self.refused += 1
                print(f"refused: {event} {error}", file=sys.stderr, flush=True)
            self.state.artifacts_waiting = [one for one in self.state.artifacts_waiting if one is not event]
            self._save()

    def _store(self, artifact: dict[str, Any]) -> None:
        assert self._client is not None
        path = self.run_dir / artifact["path"]
        if path.exists():
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self.state.run_id, str(path), artifact["folder"] or None)

    def _apply(self, event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        assert self._client is not None
        run_id = self.state.run_id
        if event["event"] == "params":
            self._apply_params(event["values"])
        elif event["event"] == "tags":
            tags = [RunTag(_name(key), value[:5000]) for key, value in event["values"].items()]
            self._client.log_batch(run_id, tags=tags, synchronous=True)
        elif event["event"] == "artifact":
            self.state.artifacts_waiting = [*self.state.artifacts_waiting, event]
        elif event["event"] == "evaluation":
            self._apply_evaluation(event)
        elif event["event"] == "status":
            self._client.set_terminated(run_id, END_OF_RUN[event["status"]], end_time=int(event["time"] * 1000))
        elif event["event"] == "begin":
            self._client.update_run(run_id, status="RUNNING")

    def _apply_evaluation(self, event: dict[str, Any]) -> None:
        """A nested run with the metrics of one evaluation."""
        from mlflow.entities import Metric, Param

        assert self._client is not None
        when = int(event["time"] * 1000)
        key = f"{self.state.job_key}/{event['name']}/{when}"
        tags = {"mlflow.parentRunId": self.state.run_id}
        child = self._run_with_key(self._client.get_run(self.state.run_id).info.experiment_id, key, event["name"], tags)
        metrics = [Metric(_name(name), value, when, event["step"]) for name, value in event["values"].items()]
        params = [Param(_name(name), value[:6000]) for name, value in event["params"].items()]
        self._client.log_batch(child, metrics=metrics, params=params, synchronous=True)
        self._client.set_terminated(child, "FINISHED", end_time=when)

    def _apply_params(self, values: dict[str, str]) -> None:
        """MLflow's params cannot change: what a resume changed is told by a tag `changed.<name>`."""
        from mlflow.entities import Param, RunTag

        assert self._client is not None
        wanted = {_name(key): value[:6000] for key, value in values.items()}
        there = self._client.get_run(self.state.run_id).data.params
        new = [Param(key, value) for key, value in wanted.items() if key not in there]
        changed = [
            RunTag(f"changed.{key}", f"{there[key]} -> {value}"[:5000])
            for key, value in wanted.items()
            if there.get(key, value) != value
        ]
        for start in range(0, len(new), 100):
            self._client.log_batch(self.state.run_id, params=new[start : start + 100], synchronous=True)
        if changed:
            self._client.log_batch(self.state.run_id, tags=changed, synchronous=True)


def _name(name: str) -> str:
    """A name MLflow accepts."""
    return re.sub(r"[^\w\-./: ]", "_", name).strip("/")[:250]


def _points(record: dict[str, Any], already: dict[int, set[str]]) -> list[Any]:
    from mlflow.entities import Metric

    when = int(record["time"] * 1000)
    # The other axes ride on training records only: one point a step.
    left_out = {"step", "time", "mirrored", "certain", *(() if "loss" in record else ("samples", "hours"))}
    left_out |= already.get(record["step"], set())
    return [
        Metric(_name(key), float(value), when, record["step"])
        for key, value in record.items()
        if key not in left_out and isinstance(value, int | float)
    ]


def _events(data: bytes) -> Iterator[tuple[int, int, dict[str, Any]]]:
    end = 0
    for line in data.splitlines(keepends=True):
        start, end = end, end + len(line)
        if not line.endswith(b"\n"):
            return
        try:
            event = json.loads(line)
        except ValueError:  # torn by a kill or a full disk: it must not stand in the way of all that follow
            continue
        yield start, end, event


def _complete(data: bytes) -> int:
    """Bytes up to the end of the last whole line; what follows is being written, or was torn."""
    return data.rfind(b"\n") + 1


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_from(path: Path, offset: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read()
