"""What MLflow refuses is about run, experiment, value or server: an offset moves only over what the server has."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow_server import MlflowServer
from test_mirror import assert_complete, started, state, train

from d2v_scale.tracking import RunTracker, TrackingConfig, log_evaluation, mirror_lines
from d2v_scale.tracking.follow import catch_up
from d2v_scale.tracking.mirror import REFUSED_FILE, Mirror
from d2v_scale.tracking.mirror_server import InTrash, Server

SYNC = Path(__file__).resolve().parents[2] / "tools" / "sync_mlflow.py"


@pytest.fixture
def client(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    return MlflowClient(mlflow_server.uri)


def sync(run_dir: Path) -> tuple[int, str]:
    ended = subprocess.run([sys.executable, str(SYNC), str(run_dir)], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def recorded(run_dir: Path, experiment: str = "test") -> None:
    tracker = RunTracker(run_dir, TrackingConfig(experiment=experiment, enabled=False), is_main=True)
    tracker.start({"seed": 1}, {"purpose": "test"})
    train(run_dir, 1, 3, tracker, pause=0)
    tracker.finish("done")


def test_points_recorded_while_the_run_is_in_the_trash_arrive_after_its_restore(
    tmp_path: Path, client: MlflowClient, mlflow_server: MlflowServer
) -> None:
    run_dir = tmp_path / "run"
    recorded(run_dir)
    assert catch_up(run_dir) is not None
    before = state(run_dir)
    client.delete_run(before["run_id"])
    tracker = started(run_dir, resume_step=3, enabled=False)
    train(run_dir, 4, 6, tracker, pause=0)
    tracker.finish("done")
    orphan = Mirror(run_dir)
    for _ in range(2):
        with pytest.raises(InTrash, match=r"deleted there: restore it"):
            orphan.step()
    after = state(run_dir)
    assert [after[name] for name in ("run_id", "metrics_offset", "events_offset", "refused")] == [
        before[name] for name in ("run_id", "metrics_offset", "events_offset", "refused")
    ]
    code, said = sync(run_dir)
    assert (code, "not complete" in said, "is complete" in said) == (1, True, False)
    client.restore_run(before["run_id"])
    code, said = sync(run_dir)
    assert (code, "is complete" in said) == (0, True)
    assert_complete(mlflow_server.uri, run_dir)


def test_a_run_deleted_while_the_mirror_sends_moves_no_offset(tmp_path: Path, client: MlflowClient) -> None:
    run_dir = tmp_path / "run"
    recorded(run_dir)
    mirror = Mirror(run_dir)
    mirror.step()
    offset = mirror.state.metrics_offset
    client.delete_run(mirror.state.run_id)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "samples": 4, "time": 4.0, "hours": 0, "loss": 0.1}\n')
    with pytest.raises(InTrash):
        mirror.step()
    assert (mirror.state.metrics_offset, mirror.refused) == (offset, 0)
    client.restore_run(mirror.state.run_id)
    mirror.step()
    assert not mirror.missing()


def test_an_experiment_in_the_trash_is_named_before_and_after_its_run_began(
    tmp_path: Path, client: MlflowClient, mlflow_server: MlflowServer
) -> None:
    run_dir = tmp_path / "run"
    recorded(run_dir, "short-lived")
    assert catch_up(run_dir) is not None
    experiment_id = client.get_run(state(run_dir)["run_id"]).info.experiment_id
    client.delete_experiment(experiment_id)
    recorded(tmp_path / "other", "short-lived")
    for name in ("run", "other"):
        log_evaluation(tmp_path / name, "probe", 3, {"accuracy": 0.5}, {})
        with pytest.raises(InTrash, match=r"experiment 'short-lived' was deleted"):
            catch_up(tmp_path / name)
    client.restore_experiment(experiment_id)
    for name in ("run", "other"):
        assert catch_up(tmp_path / name) is not None
        assert_complete(mlflow_server.uri, tmp_path / name)


def test_a_store_put_back_to_an_earlier_state_gets_what_it_lacks(
    tmp_path: Path, client: MlflowClient, mlflow_server: MlflowServer
) -> None:
    run_dir = tmp_path / "run"
    recorded(run_dir)
    assert catch_up(run_dir) is not None
    for condition in ("step > 1", "key = 'samples_per_second'"):
        with sqlite3.connect(mlflow_server.folder / "server.db", timeout=30) as store:
            run = state(run_dir)["run_id"]
            assert store.execute(f"DELETE FROM metrics WHERE run_uuid = ? AND {condition}", (run,)).rowcount > 0
        store.close()
        assert Mirror(run_dir).missing()
        code, said = sync(run_dir)
        assert code == 0, said
        assert_complete(mlflow_server.uri, run_dir)


def test_a_value_the_server_refuses_is_named_and_the_rest_is_not_called_complete(
    tmp_path: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    tracker = started(run_dir, enabled=False)
    for step in (1, 2):
        tracker.log(step, step, {"loss": 1 / step, **({"odd@": 3.0} if step == 2 else {})})
    tracker.finish("done")
    # As if the server took fewer names than we know of.
    monkeypatch.setattr(mirror_lines, "mlflow_name", lambda name: name)
    mirror = catch_up(run_dir)
    assert mirror is not None
    assert (mirror.refused, mirror.missing(), mirror.pending()) == (1, [], 0)
    (line,) = [json.loads(line) for line in (run_dir / REFUSED_FILE).read_text().splitlines()]
    assert line["refused"] == "odd@ at step 2"
    assert {m.step for m in client.get_metric_history(mirror.state.run_id, "loss")} == {1, 2}
    # Neither now nor at the next call.
    for _ in range(2):
        again = catch_up(run_dir)
        assert again is not None
        assert again.refused == 1


def answers(code: str) -> SimpleNamespace:
    """A server behind a gateway that answers everything alike."""

    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("no", error_code=getattr(__import__("mlflow").protos.databricks_pb2, code))

    return SimpleNamespace(log_batch=fail, get_run=fail, set_tag=fail)


@pytest.mark.parametrize(
    "code",
    [
        "BAD_REQUEST",
        "INVALID_PARAMETER_VALUE",
        "PERMISSION_DENIED",
        "REQUEST_LIMIT_EXCEEDED",
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "RESOURCE_ALREADY_EXISTS",
    ],
)
def test_what_a_server_says_to_everything_is_about_no_value(code: str) -> None:
    refused: list[str] = []
    server = Server(answers(code), "key", lambda what, _error: refused.append(what))
    with pytest.raises(MlflowException):
        server.log("run", metrics=[SimpleNamespace(key="loss", step=1)])
    assert not refused


def test_an_evaluation_that_somebody_deleted_holds_up_nothing(
    tmp_path: Path, client: MlflowClient, mlflow_server: MlflowServer
) -> None:
    run_dir = tmp_path / "run"
    recorded(run_dir)
    log_evaluation(run_dir, "probe", 3, {"accuracy": 0.5}, {"k": "20"})
    assert catch_up(run_dir) is not None
    run = client.get_run(state(run_dir)["run_id"])
    (child,) = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", max_results=5
    )
    client.delete_run(child.info.run_id)
    saved = state(run_dir) | {"events_offset": 0, "metrics_offset": 0}
    (run_dir / "mlflow_run.json").write_text(json.dumps(saved))
    mirror = catch_up(run_dir)
    assert mirror is not None
    assert (mirror.pending(), mirror.refused) == (0, 1)
    assert_complete(mlflow_server.uri, run_dir)
