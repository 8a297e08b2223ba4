import fcntl
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from d2v_scale.alignment import recording
from d2v_scale.evaluation.probing import tell_mlflow
from d2v_scale.tracking import RunTracker, TrackingConfig, follow
from d2v_scale.tracking.mirror import Mirror, Outdated
from d2v_scale.tracking.mirror_state import EVENTS_FILE, MirrorState
from d2v_scale.tracking.record import METRICS_FILE


@pytest.mark.parametrize("torn", ['{"st', '{"st\n'])
def test_a_torn_last_line_is_nothing_to_wait_for(tmp_path: Path, torn: str) -> None:
    """Without a line end it can never be sent; with one it is passed over."""
    (tmp_path / "logs").mkdir()
    line = json.dumps({"step": 1, "time": 1.0, "loss": 1.0}) + "\n"
    (tmp_path / METRICS_FILE).write_text(line + torn)
    (tmp_path / "logs" / "system-n1.jsonl").write_text(line + torn)
    (tmp_path / EVENTS_FILE).write_text(torn)
    mirror = Mirror(tmp_path)
    sent: list[str] = []
    client = SimpleNamespace(log_batch=lambda run, metrics, synchronous: sent.extend(one.key for one in metrics))
    mirror._client, mirror._connected = client, True  # type: ignore[assignment]
    assert mirror.pending()
    mirror.step()
    assert mirror.pending() == 0
    assert sent == ["loss", "1 quality/loss", "system/n1/loss"]


def test_the_end_of_a_run_is_waited_for_without_spinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Path] = []
    never_done = SimpleNamespace(step=lambda: turns.append(tmp_path), pending=lambda: 1, refused=0)
    monkeypatch.setattr(follow, "Mirror", lambda run_dir: never_done)
    monkeypatch.setattr(follow, "_told_to_finish", lambda seconds, parent: True)
    assert not follow.follow(tmp_path, finish_timeout=0.5)
    assert 2 <= len(turns) <= 10


def test_a_run_that_goes_back_keeps_its_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = RunTracker(tmp_path, TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    for step in range(1, 6):
        tracker.log(step, 8 * step, {"loss": 1 / step})
    turns = iter(range(9))

    def told_to_finish(seconds: float, parent: int) -> bool:
        """The run goes back while the mirror waits between its first turns, then goes on, then ends."""
        turn = next(turns)
        if turn == 0:
            tracker.rewound(3)
        elif turn == 1:
            for step in range(4, 9):
                tracker.log(step, 8 * step, {"loss": 2 / step})
        return turn == 2

    monkeypatch.setattr(follow, "_told_to_finish", told_to_finish)
    assert follow.follow(tmp_path, finish_timeout=30)
    known = MirrorState.load(tmp_path)
    history = MlflowClient(uri).get_metric_history(known.run_id, "1 quality/loss")
    assert {point.step for point in history} == set(range(1, 9))


def test_the_mirror_of_an_attempt_that_another_has_followed_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outdated() -> None:
        RunTracker(tmp_path, TrackingConfig(enabled=False), is_main=True).start({}, {})
        raise Outdated

    monkeypatch.setattr(follow, "Mirror", lambda run_dir: SimpleNamespace(step=outdated))
    assert not follow.follow(tmp_path, finish_timeout=1)


def test_a_probe_and_an_alignment_of_a_run_become_its_nested_runs_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `d2v sync`, but where MLflow has the run and no one else is sending."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = RunTracker(tmp_path, TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    tracker.log(5, 40, {"loss": 0.5})
    tracker.finish("done")
    tell_mlflow(tmp_path, 4, "random", "knn", {"accuracy": 0.25})
    assert "which MLflow does not have" in capsys.readouterr().out
    follow.catch_up(tmp_path)
    with (tmp_path / follow.LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tell_mlflow(tmp_path, 4, "student", "knn", {"accuracy": 0.5})
    assert "is in progress and sends it to MLflow itself" in capsys.readouterr().out
    tell_mlflow(tmp_path, 5, "teacher", "linear", {"accuracy": 0.75})
    assert capsys.readouterr().out == f"Recorded in {tmp_path}, and in MLflow as a nested run of it.\n"
    source = SimpleNamespace(run_dir=tmp_path, step=5)
    pairs = {"vision - speech": {"verdicts": {"CKA": {"score": 0.5, "verdict": "at chance"}}}}
    result = {"weights": "teacher", "data": {"held_out": "pairs.tar"}, "pairs": pairs}
    [run_dir] = recording.record(result, [SimpleNamespace(sources=[source])], [])  # type: ignore[list-item]
    assert "as a nested run of it" in follow.pass_on(run_dir)
    client, known = MlflowClient(uri), MirrorState.load(tmp_path)
    nested = client.search_runs([known.experiment_id], f"tags.mlflow.parentRunId = '{known.run_id}'")
    found = {one.info.run_name: (one.data.params["task"], one.data.metrics) for one in nested}
    assert found == {
        "knn random": ("knn", {"probe/accuracy": 0.25}),
        "knn student": ("knn", {"probe/accuracy": 0.5}),
        "linear teacher": ("linear", {"probe/accuracy": 0.75}),
        "align teacher": ("align", {"align/vision-speech/CKA": 0.5, "align/above_controls/vision-speech/CKA": 0.0}),
    }
