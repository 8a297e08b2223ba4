import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2v_scale.batch import Batch
from d2v_scale.errors import EXIT_LOST_PEER
from d2v_scale.process.status import write_status
from d2v_scale.tracking import RunTracker, TrackingConfig
from d2v_scale.tracking.events import append_event
from d2v_scale.tracking.follow import note_sudden_end
from d2v_scale.tracking.mirror_lines import events_in
from d2v_scale.tracking.mirror_state import EVENTS_FILE


def started(run_dir: Path) -> RunTracker:
    tracker = RunTracker(run_dir, TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    return tracker


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "mlflow_events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_every_start_after_the_first_counts_as_a_restart(tmp_path: Path) -> None:
    for _ in range(3):
        started(tmp_path)
    assert [event["values"]["restarts"] for event in events(tmp_path, "tags")] == ["0", "1", "2"]


@pytest.mark.parametrize("broken", [False, True])
def test_the_first_batch_is_drawn_and_a_failure_is_only_said(
    tmp_path: Path, broken: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    masked_rt = torch.zeros(2, 16, dtype=torch.bool)
    masked_rt[:, :5] = True
    side = 0 if broken else 16
    batch = Batch(
        modality="vision",
        inputs=torch.randn(2, 3, side, side),
        valid=None,
        masked_rt=masked_rt,
        sample_ids=torch.arange(2),
        grid=(4, 4),
    )
    started(tmp_path).preview(batch, "vision")
    assert (tmp_path / "plots" / "first_batch.png").exists() is not broken
    assert ("was not drawn" in capsys.readouterr().out) is broken
    assert len(events(tmp_path, "artifact")) == (0 if broken else 1)


def test_records_of_one_step_start_one_drawing_of_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record of a step, of which there are several where it is evaluated, started one beside the others."""

    class Drawing:
        ended = False

        def poll(self) -> int | None:
            return 0 if self.ended else None

        def wait(self, timeout: float) -> None:
            self.ended = True

    drawings: list[Drawing] = []
    monkeypatch.setattr(RunTracker, "_draw", lambda *_: drawings.append(Drawing()) or drawings[-1])
    tracker = RunTracker(tmp_path, TrackingConfig(enabled=False, plot_every=2), is_main=True)
    tracker.start({}, {})
    for values in ({"loss": 1.0}, {"knn_accuracy": 0.5}, {"held_out_loss": 1.0}):
        tracker.log(2, 2, values)
    assert len(drawings) == 1
    drawings[0].ended = True
    tracker.log(3, 3, {"loss": 1.0})  # what was recorded meanwhile is not forgotten
    assert len(drawings) == 2
    tracker.log(3, 3, {"knn_accuracy": 0.5})
    assert len(drawings) == 2
    tracker.finish("done")
    assert [one.ended for one in drawings] == [True, True, False]


def test_a_torn_event_costs_itself_and_nothing_else(tmp_path: Path) -> None:
    append_event(tmp_path, "begin")
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"event": "params", "values": {"a": ')
    append_event(tmp_path, "status", status="done")
    data = (tmp_path / EVENTS_FILE).read_bytes()
    found = list(events_in(data))
    assert [event["event"] for _, _, event in found] == ["begin", "status"]
    assert found[-1][1] == len(data)


def test_a_run_that_was_killed_does_not_stay_running(tmp_path: Path) -> None:
    append_event(tmp_path, "begin")
    note_sudden_end(tmp_path, starts=1)
    assert b'"status": "failed"' in (tmp_path / EVENTS_FILE).read_bytes()
    note_sudden_end(tmp_path, starts=1)
    append_event(tmp_path, "begin")
    note_sudden_end(tmp_path, starts=1)  # of the first attempt, while the second runs
    write_status(tmp_path, EXIT_LOST_PEER, "rank 3 is gone")
    note_sudden_end(tmp_path, starts=2)
    events = [event for _, _, event in events_in((tmp_path / EVENTS_FILE).read_bytes())]
    assert [event["event"] for event in events] == ["begin", "status", "begin", "status"]
    assert events[-1]["status"] == "requeue"


PROGRAM = """
import os, signal, sys
from pathlib import Path
from d2v_scale.process.signals import StopFlag
from d2v_scale.tracking import RunTracker, TrackingConfig
flag = StopFlag.install()
tracker = RunTracker(Path(sys.argv[1]), TrackingConfig(enabled=False), is_main=True)
try:
    tracker.start({}, {})
    with tracker:
        %s
except ValueError:
    os._exit(1)
"""


@pytest.mark.parametrize("end", ["raise ValueError", "signal.raise_signal(signal.SIGINT)"])
def test_a_run_that_fails_or_is_stopped_early_does_not_leave_the_cursor_hidden(end: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    command = [sys.executable, "-c", PROGRAM % end, str(tmp_path)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 4096):
            output += part
    os.close(ours)
    assert process.wait() != 0
    assert 0 <= output.rfind(b"\x1b[?25l") < output.rfind(b"\x1b[?25h"), output
