"""How far MLflow has followed a run directory: mlflow_run.json, written by the mirror."""

import contextlib
import fcntl
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from d2v_scale.errors import UserError
from d2v_scale.files import write_whole
from d2v_scale.redaction import REDACTED, redact

STATE_FILE = "mlflow_run.json"
STATE_LOCK = ".mlflow_run.lock"
EVENTS_FILE = "mlflow_events.jsonl"


@dataclass(kw_only=True)
class MirrorState:
    """Position of the mirror in the run directory's files. Offsets are bytes."""

    tracking_uri: str = ""
    run_id: str = ""
    """The one MLflow run of this training job; empty until a server has answered."""
    experiment_id: str = ""
    """Of that run."""
    job_key: str = ""
    """Ours, a tag of the MLflow run: finds the run again when the answer to its creation was lost."""
    generation: int = 0
    """Counts how often metrics.jsonl was rewritten: a mirror that began before must not go on."""
    metrics_offset: int = 0
    """metrics.jsonl up to here is in MLflow."""
    metrics_sending: int = 0
    """Up to here it may be: an attempt to send it was begun."""
    events_offset: int = 0
    """mlflow_events.jsonl up to here is done, but for the artifacts that wait."""
    refused: int = 0
    """Points and events that MLflow declared invalid."""
    artifacts_waiting: list[dict[str, Any]] = field(default_factory=list)
    """Events of artifacts that are not stored yet."""
    system_offsets: dict[str, int] = field(default_factory=dict)
    """Files of `SystemMonitor` by name: up to here they are in MLflow."""

    @classmethod
    def load(cls, run_dir: Path) -> "MirrorState":
        """The saved state; a fresh one when there is none or it cannot be read."""
        try:
            saved = json.loads((run_dir / STATE_FILE).read_text())
        except (OSError, ValueError):
            return cls()
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})

    def save(self, run_dir: Path) -> None:
        """Replace the saved state."""
        write_whole(run_dir / STATE_FILE, json.dumps(asdict(self), indent=1) + "\n")


@contextlib.contextmanager
def state_locked(run_dir: Path) -> Iterator[None]:
    """Keep others from replacing the saved state and what its offsets are in, where the file system knows locks."""
    with (run_dir / STATE_LOCK).open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kept_uri(uri: str) -> str:
    """`uri` as a run directory keeps it. An HTTP server's user and password are MLFLOW_TRACKING_USERNAME's and
    MLFLOW_TRACKING_PASSWORD's to give the next time; another store's address is redacted."""
    return re.sub(r"^(https?://)[^/@]*@", r"\1", redact(uri))


def tracking_uri(run_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, else the store that has this run, else a sqlite store beside the run directories.

    Beside them, so that sibling runs compare. A resume or a later sync without the variable goes on where the run is;
    only a sqlite store that is no more (the run directories were moved) is made anew beside them.
    Raises UserError where the store's password would be needed, which nothing keeps.
    """
    recorded = MirrorState.load(run_dir).tracking_uri
    if REDACTED in recorded and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            f"The run in {run_dir} is at {recorded}, whose password is kept nowhere.", "Set MLFLOW_TRACKING_URI."
        )
    gone = recorded.startswith("sqlite:///") and not Path(unquote(recorded.removeprefix("sqlite:///"))).exists()
    # In a database's URL `?` begins its options, and %20 is a space.
    place = str(run_dir.resolve().parent / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    local = f"sqlite:///{place}"
    return os.environ.get("MLFLOW_TRACKING_URI") or (local if gone or not recorded else recorded)


def charts(run_dir: Path) -> list[str]:
    """How to look at the run's charts in MLflow, a line each; [] where no server has it."""
    state = MirrorState.load(run_dir)
    if not state.run_id or not state.experiment_id:
        return []
    page = f"#/experiments/{state.experiment_id}/runs/{state.run_id}/model-metrics?workflowType=machine_learning"
    if state.tracking_uri.startswith("http"):
        return [f"{state.tracking_uri.rstrip('/')}/{page}"]
    if REDACTED in state.tracking_uri:
        return []
    return [f"mlflow ui --backend-store-uri {shlex.quote(state.tracking_uri)}", f"http://127.0.0.1:5000/{page}"]


def shown_uri(run_dir: Path) -> str:
    """`tracking_uri` for people: without a password, and whether it can be used or not."""
    try:
        return redact(tracking_uri(run_dir))
    except UserError:
        return MirrorState.load(run_dir).tracking_uri
