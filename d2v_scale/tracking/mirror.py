"""The MLflow mirror: a process of its own that follows a run directory and repeats it to a tracking server.

It reads only files (metrics.jsonl, mlflow_events.jsonl) and remembers its position in mlflow_run.json, so training
never waits for it, an outage loses nothing, and `d2v sync` can finish its work on another machine. Sending
is idempotent: MLflow identifies a point by (name, time, step, value), and a repeated point adds nothing.

A process instead of a thread because creating the sqlite store takes seconds of pure Python, which in a thread would
slow the training steps down.
"""

import contextlib
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2v_scale.files import append_line
from d2v_scale.redaction import redact
from d2v_scale.tracking.mirror_events import END_OF_RUN, apply
from d2v_scale.tracking.mirror_lines import (
    complete_bytes,
    events_in,
    points_of,
    read_from,
    read_lines,
    size_of,
)
from d2v_scale.tracking.mirror_server import Server, describe_point
from d2v_scale.tracking.mirror_state import EVENTS_FILE, MirrorState, kept_uri, state_locked, tracking_uri
from d2v_scale.tracking.record import AXES, METRICS_FILE, SUPERSEDED_FILE, parse_lines
from d2v_scale.tracking.system import node_of, system_files

POINTS_PER_CALL = 1000
REFUSED_FILE = "logs/mlflow_refused.jsonl"
_ENOUGH = POINTS_PER_CALL - 100
"""Points to wait for before a call: another record might no longer fit."""
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Outdated(Exception):
    """The record was rewritten under this mirror: by the next attempt, or as the run went back to an earlier step."""


class NotStored(Exception):
    """Artifacts that their store does not take; everything else has been sent."""


class Mirror:
    """Repeats one run directory to MLflow. `step()` sends what is there; it raises what MLflow raises."""

    def __init__(self, run_dir: Path) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.run_dir = run_dir
        begin = next((e for _, _, e in events_in(read_from(run_dir / EVENTS_FILE, 0)) if e["event"] == "begin"), {})
        self.experiment = begin.get("experiment", "d2v_scale")
        self.run_name = begin.get("run_name") or run_dir.resolve().name
        self._origin: dict[str, str] = begin.get("origin", {})
        self._stems: dict[str, str] = begin.get("stems", {})
        uri = tracking_uri(run_dir)
        self.state = MirrorState.load(run_dir)
        if self.state.tracking_uri != kept_uri(uri):
            key = self.state.job_key or uuid.uuid4().hex
            self.state = MirrorState(tracking_uri=kept_uri(uri), job_key=key, generation=self.state.generation)
            self.state.save(run_dir)
        if self.state.metrics_offset > size_of(run_dir / METRICS_FILE):
            # Of a file that is no more; what is sent a second time adds nothing.
            self.state.metrics_offset = self.state.metrics_sending = 0
        self._make_client: Callable[[], MlflowClient] = lambda: MlflowClient(tracking_uri=uri)
        self._client: MlflowClient | None = None
        self._already: dict[int, set[str]] = {}
        self._connected = False

    @property
    def refused(self) -> int:
        """Points and events of this run that MLflow declared invalid; logs/mlflow_refused.jsonl names them."""
        return self.state.refused

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
        unsent = sum(complete_bytes(read_from(path, offset)) for path, offset in offsets.items())
        return unsent + len(self.state.artifacts_waiting)

    def step(self) -> None:
        """Send everything that is complete in the files now."""
        self._check_generation()
        if not self.pending():
            return
        try:
            self._send()
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST" or self._server.knows(self.state.run_id):
                raise
            # The run was removed for good, or another store answers at the same address: it gets all of it.
            self._begin_again(run_id="")
            self._send()

    def send_all_again(self) -> None:
        """Send the whole run directory, whatever was sent before; adds only what the server does not have."""
        self._begin_again(self.state.run_id)
        self._send()

    def _begin_again(self, run_id: str) -> None:
        """Forget what was sent: what the server has of it is not added twice."""
        old = self.state
        self.state = MirrorState(
            tracking_uri=old.tracking_uri,
            job_key=old.job_key,
            generation=old.generation,
            run_id=run_id,
            experiment_id=old.experiment_id if run_id else "",
        )
        self._connected = False

    @property
    def _server(self) -> Server:
        assert self._client is not None
        return Server(self._client, self.state.job_key, self._refuse)

    def _refuse(self, what: str, error: Exception) -> None:
        """Note what MLflow declared invalid: the record has it, MLflow will not."""
        self.state.refused += 1
        refused = {"run": self.state.run_id, "refused": what, "reason": redact(str(error).splitlines()[0][:500])}
        with contextlib.suppress(OSError):
            (self.run_dir / "logs").mkdir(exist_ok=True)
            append_line(self.run_dir / REFUSED_FILE, refused)
        print(f"refused: {what} ({refused['reason']})", file=sys.stderr, flush=True)

    def missing(self, *names: str) -> list[str]:
        """Which recorded names (none given: all) the server does not have at every step up to the mirror's offset.

        A store that was put back to an earlier state lacks what the offset says it has. Asks the server.
        """
        if not self.state.run_id:
            return []
        if self._client is None:
            self._client = self._make_client()
        self._load_superseded(send=False)
        wanted: dict[str, set[tuple[int, int]]] = {}
        data = read_from(self.run_dir / METRICS_FILE, 0)[: self.state.metrics_offset]
        for _, _, record in parse_lines(data):
            for point in points_of(record, self._already, self._stems):
                if not names or point.key in names:
                    wanted.setdefault(point.key, set()).add((point.step, point.timestamp))
        refused = {line.get("refused") for line in read_lines(self.run_dir / REFUSED_FILE)}
        lacking = []
        for name, points in wanted.items():
            left = points - self._server.points(self.state.run_id, name)
            if any(describe_point(name, step) not in refused for step, _ in left):
                lacking.append(name)
        return lacking

    def _send(self) -> None:
        if not self._connected:
            self._client = self._client or self._make_client()
            self._ensure_run()
            if self.missing("loss"):
                print("the server lacks points that it had: all is sent again", file=sys.stderr, flush=True)
                self._begin_again(self.state.run_id)
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
        if self.state.run_id and self._server.is_ours(self.state.run_id):
            self.state.experiment_id = self._server.experiment_of(self.state.run_id)
            return
        if self.state.run_id:  # another job's, by its key
            self._begin_again(run_id="")
        self.state.experiment_id = self._ensure_experiment()
        tags = {"mlflow.source.name": "d2v_scale", **self._origin}
        self.state.run_id = self._server.run_for(self.state.experiment_id, self.state.job_key, self.run_name, tags)
        self._save()

    def _ensure_experiment(self) -> str:
        local = self.state.tracking_uri.startswith("sqlite:")
        place = (self.run_dir.resolve().parent / "mlflow_artifacts").as_uri() if local else None
        return self._server.experiment(self.experiment, place)

    # Metrics

    def _load_superseded(self, send: bool = True) -> None:
        """What MLflow holds of earlier attempts: those (step, name) are not sent a second time."""
        self._already = {}
        path = self.run_dir / SUPERSEDED_FILE
        unsure: list[dict[str, Any]] = []
        for _, _, record in parse_lines(path.read_bytes()) if path.exists() else ():
            if record.get("mirrored") == self.state.run_id:
                if not record.get("certain", True):
                    unsure.append(record)
                self._already.setdefault(record["step"], set()).update(record)
        if send:
            self._log_points([point for record in unsure for point in points_of(record, {}, self._stems)])

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
            data = read_from(path, begin)
            for _, end, record in parse_lines(data):
                named = {key if key in AXES else prefix + key: value for key, value in record.items()}
                points += points_of(named, {}, {})
                offsets = {**offsets, path.name: begin + end}
                if len(points) >= _ENOUGH:
                    self._log_system(points, offsets)
                    points = []
            offsets = {**offsets, path.name: begin + complete_bytes(data)}
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
        data = read_from(self.run_dir / METRICS_FILE, begin)
        for _, line_end, record in parse_lines(data):
            points += points_of(record, self._already, self._stems)
            end = begin + line_end
            if len(points) >= _ENOUGH:
                break
        else:
            end = begin + complete_bytes(data)
        return (points, end) if end > begin else None

    def _log_points(self, points: list[Any]) -> None:
        for start in range(0, len(points), POINTS_PER_CALL):
            self._server.log(self.state.run_id, metrics=points[start : start + POINTS_PER_CALL])

    # Params, tags, artifacts, status

    def _send_events(self, final: bool) -> None:
        """Do the events in order. A status that ends the run waits until all metrics are sent (`final`)."""
        from mlflow.exceptions import MlflowException

        begin = self.state.events_offset
        data = read_from(self.run_dir / EVENTS_FILE, begin)
        for start, end, event in events_in(data):
            if event["event"] == "status" and event["status"] in END_OF_RUN and not final:
                return
            try:
                if event["event"] == "artifact":
                    self.state.artifacts_waiting = [*self.state.artifacts_waiting, event]
                else:
                    apply(event, self.state.run_id, self.state.job_key, self._server)
            except MlflowException as error:
                if not self._server.blames_what_was_sent(error, self.state.run_id):
                    raise
                self._refuse(f"event {event['event']} at byte {begin + start}", error)
            self.state.events_offset = begin + end
            self._save()
        if self.state.events_offset != begin + complete_bytes(data):  # the last line is none
            self.state.events_offset = begin + complete_bytes(data)
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
                if not self._server.blames_what_was_sent(error, self.state.run_id):
                    others = [one for one in self.state.artifacts_waiting if one is not event]
                    self.state.artifacts_waiting = [*others, event]
                    self._save()
                    reason = f"not the artifact {event['path']} ({type(error).__name__}: {error})"
                    raise NotStored(reason + f", and {len(others)} more wait" * bool(others)) from error
                self._refuse(f"artifact {event['path']}", error)
            self.state.artifacts_waiting = [one for one in self.state.artifacts_waiting if one is not event]
            self._save()

    def _store(self, artifact: dict[str, Any]) -> None:
        assert self._client is not None
        path = self.run_dir / artifact["path"]
        if path.exists():
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self.state.run_id, str(path), artifact["folder"] or None)
