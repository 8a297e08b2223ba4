"""The mirror against a real MLflow server that is there, killed, slow, failing, or absent."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_server import MlflowServer, Proxy, free_port

from d2v_scale.tracking import RunTracker, TrackingConfig, log_evaluation, mirror_names, read_records
from d2v_scale.tracking.follow import catch_up
from d2v_scale.tracking.mirror import Mirror, NotStored, Outdated
from d2v_scale.tracking.mirror_state import MirrorState, tracking_uri
from d2v_scale.tracking.record import METRICS_FILE, MetricsLog

ROOT = Path(__file__).resolve().parents[2]


def train(
    run_dir: Path, first: int, last: int, tracker: RunTracker, pause: float = 0.02, at: dict[int, Any] | None = None
) -> float:
    """Log steps first..last; the longest that a single `log` took, seconds.

    Whatever the server does, it costs the training process next to no work either.
    """
    slowest, worked = 0.0, 0.0
    for step in range(first, last + 1):
        time.sleep(pause)
        if at and step in at:
            at[step]()
        begin, work = time.perf_counter(), time.thread_time()
        tracker.log(step, 32 * step, {"loss": 1 / step, "samples_per_second": 100 + time.time() % 1})
        slowest, worked = max(slowest, time.perf_counter() - begin), worked + time.thread_time() - work
    assert worked / (last - first + 1) < 5e-3
    return slowest


def started(run_dir: Path, resume_step: int | None = None, **config: Any) -> RunTracker:
    tracker = RunTracker(run_dir, TrackingConfig(experiment="test", **config), is_main=True)
    tracker.start({"optim": {"lr": 1e-3}}, {"purpose": "test"}, resume_step=resume_step, total_steps=100)
    return tracker


def assert_complete(uri: str, run_dir: Path, status: str = "FINISHED") -> MlflowClient:
    """Every value of every record is in MLflow, once, with its step and time; nothing else is."""
    client = MlflowClient(uri)
    run_id = json.loads((run_dir / "mlflow_run.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == status
    records = read_records(run_dir)
    assert records
    for name in {key for record in records for key in record} - {"step", "time"}:
        wanted = [(r["step"], int(r["time"] * 1000), r[name]) for r in records if name in r]
        points = client.get_metric_history(run_id, mirror_names.shown_as(name, {})[-1])
        assert sorted((m.step, m.timestamp, m.value) for m in points) == sorted(wanted), name
    return client


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "mlflow_run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_record_params_tags_artifacts_and_status_arrive(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run_dir = tmp_path / "run"
    tracker = started(run_dir)
    (run_dir / "recipe.yaml").write_text("a: 1\n")
    tracker.artifact(run_dir / "recipe.yaml", "inputs")
    train(run_dir, 1, 30, tracker)
    tracker.finish("done")
    client = assert_complete(mlflow_server.uri, run_dir)
    run = client.get_run(state(run_dir)["run_id"])
    assert run.data.params == {"optim.lr": "0.001"}
    assert run.data.tags["purpose"] == "test"
    assert run.data.tags["mlflow.runName"] == "run"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "inputs")] == ["inputs/recipe.yaml"]


def test_a_killed_server_loses_nothing_and_costs_one_warning(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run_dir = tmp_path / "run"
    tracker = started(run_dir)
    wait_for(lambda: state(run_dir).get("run_id"))
    slowest = train(run_dir, 1, 100, tracker, at={60: mlflow_server.kill})
    wait_for(lambda: "Connection refused" in (run_dir / "logs" / "mlflow.log").read_text())
    train(run_dir, 101, 110, tracker)
    mlflow_server.start()
    train(run_dir, 111, 150, tracker)
    wait_for(lambda: state(run_dir)["metrics_offset"] == (run_dir / "metrics.jsonl").stat().st_size, 60)
    tracker.finish("done")
    assert_complete(mlflow_server.uri, run_dir)
    assert slowest < 0.5
    assert capsys.readouterr().out.count("MLflow at") == 1


def test_a_failing_server_loses_nothing(
    tmp_path: Path, proxy: Proxy, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    run_dir = tmp_path / "run"
    proxy.failing = True
    tracker = started(run_dir)
    wait_for(lambda: proxy.answered >= 1)
    slowest = train(run_dir, 1, 50, tracker)
    proxy.failing = False
    wait_for(lambda: state(run_dir).get("metrics_offset"))
    train(run_dir, 51, 60, tracker)
    tracker.finish("done")
    assert_complete(mlflow_server.uri, run_dir)
    assert slowest < 0.5


@pytest.mark.parametrize(("delay", "steps"), [(0.5, 100), pytest.param(5.0, 500, marks=pytest.mark.slow)])
def test_a_slow_server_does_not_slow_steps_and_gets_everything(
    tmp_path: Path, proxy: Proxy, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, delay: float, steps: int
) -> None:
    proxy.delay = delay
    run_dir = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    tracker = started(run_dir, finish_timeout=120.0)
    assert train(run_dir, 1, steps, tracker) < 0.5
    tracker.finish("done")
    assert_complete(mlflow_server.uri, run_dir)


def test_an_absent_server_costs_one_warning_and_sync_sends_it_all(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    run_dir = tmp_path / "run"
    tracker = started(run_dir)
    slowest = train(run_dir, 1, 50, tracker)
    begin = time.monotonic()
    tracker.finish("done")
    assert time.monotonic() - begin < 15
    assert slowest < 0.5
    output = capsys.readouterr().out
    assert output.count("does not take records (connection refused)") == 1
    assert "d2v sync" in output

    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow_server.uri}
    for _ in range(2):  # repeated: nothing is added
        command = [sys.executable, str(ROOT / "tools" / "sync_mlflow.py"), str(run_dir)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert_complete(mlflow_server.uri, run_dir)


KILLED_RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_mirror import started, train, state, wait_for
run_dir = Path({run_dir!r})
tracker = started(run_dir)
train(run_dir, 1, 60, tracker)
wait_for(lambda: state(run_dir).get("metrics_offset"))
train(run_dir, 61, 70, tracker)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_and_resumed_run_has_neither_gaps_nor_repeats(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run_dir = tmp_path / "run"
    script = KILLED_RUN.format(tests=str(Path(__file__).parent), run_dir=str(run_dir))
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    while run.stdout.readline().strip() != "ready":
        assert run.poll() is None
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    first_id = state(run_dir)["run_id"]
    wait_for(lambda: catch_up(run_dir) is not None)  # the orphaned mirror sends what is left, then goes

    tracker = started(run_dir, resume_step=40)
    train(run_dir, 41, 100, tracker)
    tracker.finish("done")
    assert state(run_dir)["run_id"] == first_id
    records = read_records(run_dir)
    assert [record["step"] for record in records] == list(range(1, 101))
    hours = [record["hours"] for record in records]
    assert hours == sorted(hours)
    client = MlflowClient(mlflow_server.uri)
    for name in ("loss", "samples", "hours", "samples_per_second"):
        assert [m.step for m in client.get_metric_history(first_id, name)] == list(range(1, 101)), name
    assert [(m.step, m.value) for m in client.get_metric_history(first_id, "loss")] == [
        (s, 1 / s) for s in range(1, 101)
    ]


def test_changed_params_of_a_resume_become_tags_and_evaluations_nested_runs(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run_dir = tmp_path / "run"
    tracker = started(run_dir, enabled=False)
    train(run_dir, 1, 3, tracker, pause=0)
    tracker.finish("requeue")
    tracker = RunTracker(run_dir, TrackingConfig(enabled=False), is_main=True)
    tracker.start({"optim": {"lr": 2e-3}, "stop_at": 5}, {}, resume_step=3)
    train(run_dir, 4, 5, tracker, pause=0)
    tracker.finish("done")
    log_evaluation(run_dir, "knn", 5, {"accuracy": 0.5}, {"k": "20"})
    assert catch_up(run_dir) is not None
    client = assert_complete(mlflow_server.uri, run_dir)
    run = client.get_run(state(run_dir)["run_id"])
    assert run.data.params == {"optim.lr": "0.001", "stop_at": "5"}
    assert run.data.tags["changed.optim.lr"] == "0.001 -> 0.002"
    children = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert [(c.info.run_name, c.data.metrics, c.data.params) for c in children] == [
        ("knn", {"accuracy": 0.5}, {"k": "20"})
    ]


def test_an_orphaned_mirror_does_not_overwrite_the_position_of_the_resumed_run(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run_dir = tmp_path / "run"
    tracker = started(run_dir, enabled=False)
    train(run_dir, 1, 20, tracker, pause=0)
    orphan = Mirror(run_dir)
    orphan.step()
    train(run_dir, 21, 30, tracker, pause=0)
    resumed = started(run_dir, resume_step=10, enabled=False)
    train(run_dir, 11, 40, resumed, pause=0)
    with pytest.raises(Outdated):
        orphan.step()
    resumed.finish("done")
    assert catch_up(run_dir) is not None
    found = MlflowClient(mlflow_server.uri).get_metric_history(state(run_dir)["run_id"], "loss")
    assert [point.step for point in found] == list(range(1, 41))


def test_an_orphaned_mirror_cannot_save_while_the_record_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old position lay beyond the end of the new file, and nothing more was sent."""
    train(tmp_path, 1, 30, started(tmp_path, enabled=False), pause=0)
    orphan = Mirror(tmp_path)
    orphan.state.metrics_offset = orphan.state.metrics_sending = (tmp_path / METRICS_FILE).stat().st_size
    load = MirrorState.load
    resuming: list[threading.Thread] = []

    def load_and_resume(run_dir: Path) -> MirrorState:
        found = load(run_dir)
        monkeypatch.setattr(MirrorState, "load", load)
        resuming.append(threading.Thread(target=MetricsLog, args=(run_dir, 10)))
        resuming[0].start()
        resuming[0].join(timeout=0.5)
        return found

    monkeypatch.setattr(MirrorState, "load", load_and_resume)
    orphan._save()
    resuming[0].join()
    assert state(tmp_path)["generation"] == 1
    assert state(tmp_path)["metrics_offset"] == (tmp_path / METRICS_FILE).stat().st_size
    with pytest.raises(Outdated):
        orphan._save()


def test_a_position_beyond_the_end_of_the_record_begins_again(tmp_path: Path) -> None:
    train(tmp_path, 1, 3, started(tmp_path, enabled=False), pause=0)
    MirrorState(tracking_uri=tracking_uri(tmp_path), metrics_offset=10**6, metrics_sending=10**6).save(tmp_path)
    assert Mirror(tmp_path).state.metrics_offset == 0


def test_system_metrics_of_all_nodes_share_calls(tmp_path: Path) -> None:
    calls: list[int] = []
    mirror = Mirror(tmp_path)
    mirror._client = SimpleNamespace(log_batch=lambda run, metrics, synchronous: calls.append(len(metrics)))  # type: ignore[assignment]
    (tmp_path / "logs").mkdir()
    line = json.dumps({"step": 1, "time": 1.0, **{f"gpu_{i}_utilization_percentage": 50 for i in range(32)}}) + "\n"
    for node in range(64):
        (tmp_path / "logs" / f"system-n{node:02d}.jsonl").write_text(line)
    mirror._send_system()
    assert sum(calls) == 64 * 32
    assert len(calls) == 3
    assert mirror.state.system_offsets == {f"system-n{node:02d}.jsonl": len(line) for node in range(64)}
    mirror._send_system()
    assert len(calls) == 3


def test_without_the_variable_a_run_stays_with_its_server(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run_dir = tmp_path / "run"
    tracker = started(run_dir, enabled=False)
    train(run_dir, 1, 5, tracker, pause=0)
    assert catch_up(run_dir) is not None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    train(run_dir, 6, 9, tracker, pause=0)
    tracker.finish("done")
    assert catch_up(run_dir) is not None
    assert_complete(mlflow_server.uri, run_dir)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_store_that_was_emptied_is_filled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_server: MlflowServer
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run_dir = tmp_path / "run"
    tracker = started(run_dir, enabled=False)
    train(run_dir, 1, 5, tracker, pause=0)
    tracker.finish("done")
    saved = {"tracking_uri": mlflow_server.uri, "run_id": "0" * 32, "job_key": "f" * 32, "metrics_offset": 100}
    (run_dir / "mlflow_run.json").write_text(json.dumps(saved))
    assert catch_up(run_dir) is not None
    assert_complete(mlflow_server.uri, run_dir)


def test_a_value_mlflow_refuses_does_not_hold_up_the_rest(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run_dir = tmp_path / "run"
    tracker = started(run_dir, enabled=False)
    tracker.log(1, 1, {"loss": 1.0, "odd [name]@": 3.0, "a//b": 4.0, "never": float("nan"), "much": float("inf")})
    tracker.log(2, 2, {"loss": 0.5, "x" * 600: 1.0})
    tracker.finish("done")
    assert catch_up(run_dir) is not None
    client = MlflowClient(mlflow_server.uri)
    assert len(client.get_metric_history(state(run_dir)["run_id"], "loss")) == 2


def test_an_artifact_that_cannot_be_stored_holds_up_no_metrics_and_is_tried_again(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    MlflowClient(mlflow_server.uri).create_experiment("unwritable", artifact_location="file:///proc/nope/x")
    run_dir = tmp_path / "run"
    tracker = RunTracker(run_dir, TrackingConfig(experiment="unwritable", enabled=False), is_main=True)
    tracker.start({}, {})
    for name in ("recipe.yaml", "other.yaml"):
        (run_dir / name).write_text("a: 1\n")
        tracker.artifact(run_dir / name, "inputs")
    train(run_dir, 1, 5, tracker, pause=0)
    tracker.finish("done")
    # One timeout a turn, where a store hangs; the next turn begins with another.
    for name in ("recipe", "other", "recipe"):
        with pytest.raises(NotStored, match=rf"{name}\.yaml.*and 1 more wait"):
            catch_up(run_dir)
        assert_complete(mlflow_server.uri, run_dir)
    stored: list[tuple[str, ...]] = []
    monkeypatch.setattr(MlflowClient, "log_artifact", lambda _client, *arguments: stored.append(arguments))
    for _ in range(2):
        mirror = catch_up(run_dir)
        assert mirror is not None
        assert mirror.pending() == 0
    assert stored == [
        (state(run_dir)["run_id"], str(run_dir / name), "inputs") for name in ("other.yaml", "recipe.yaml")
    ]


def test_a_run_directory_of_any_name_keeps_its_store_and_artifacts(tmp_path: Path) -> None:
    folder = tmp_path / "a%20b #c ü?d=1 [x]%"
    run_dir = folder / "run?x=%2F#y z"
    run_dir.mkdir(parents=True)
    tracker = started(run_dir, enabled=False)
    (run_dir / "recipe.yaml").write_text("a: 1\n")
    tracker.artifact(run_dir / "recipe.yaml", "inputs")
    train(run_dir, 1, 3, tracker, pause=0)
    tracker.finish("done")
    mirror = catch_up(run_dir)
    assert mirror is not None
    assert mirror.missing() == []
    assert {path.name for path in folder.iterdir()} == {run_dir.name, "mlflow.db", "mlflow_artifacts"}
    assert [path.read_text() for path in (folder / "mlflow_artifacts").rglob("recipe.yaml")] == ["a: 1\n"]
    client = assert_complete(tracking_uri(run_dir), run_dir)
    run_id = state(run_dir)["run_id"]
    assert [file.path for file in client.list_artifacts(run_id, "inputs")] == ["inputs/recipe.yaml"]
    assert Path(client.download_artifacts(run_id, "inputs/recipe.yaml", str(tmp_path))).read_text() == "a: 1\n"
    # The state names the store: a later call finds it again, and the same run in it.
    assert MirrorState.load(run_dir).tracking_uri == tracking_uri(run_dir)
