import contextlib
import errno
import json
import math
import os
import re
import time
from pathlib import Path

import pytest
import torch

from d2v_scale import ranges
from d2v_scale.tracking import RunTracker, SpeedMeter, TrackingConfig, read_records
from d2v_scale.tracking.record import METRICS_FILE, SUPERSEDED_FILE, MetricsLog
from d2v_scale.tracking.terminal import Terminal
from d2v_scale.tracking.tracker import flatten


def write_steps(run_dir: Path, first: int, last: int, resume_step: int | None = None) -> None:
    log = MetricsLog(run_dir, resume_step)
    for step in range(first, last + 1):
        log.write(step, 8 * step, {"loss": 1 / step})
    log.close()


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_records(run_dir)]


def test_a_record_has_its_axes_and_reads_tensors(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(3, 24, {"loss": torch.tensor(0.5), "bad": math.inf})
    (record,) = read_records(tmp_path)  # readable before the file is closed
    assert record.items() >= {"step": 3, "samples": 24, "loss": 0.5, "bad": math.inf}.items()
    assert record["time"] > 1e9
    assert record["hours"] >= 0
    log.close()


def test_resume_moves_later_records_aside(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 57)
    write_steps(tmp_path, 41, 80, resume_step=40)
    assert steps(tmp_path) == list(range(1, 81))
    moved = (tmp_path / SUPERSEDED_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in moved] == list(range(41, 58))


def test_a_start_without_a_checkpoint_moves_everything_aside(tmp_path: Path) -> None:
    write_steps(tmp_path, 0 + 1, 5)
    write_steps(tmp_path, 1, 3)
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0}', "\x00\x00"])
def test_a_torn_last_line_is_removed(tmp_path: Path, torn: str) -> None:
    write_steps(tmp_path, 1, 3)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(torn)
    write_steps(tmp_path, 4, 5, resume_step=3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert all(json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines())


def test_an_evaluation_at_the_resumed_step_is_not_recorded_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(10, 80, {"loss": 0.5})
    log.write(10, 80, {"knn": 0.7})
    log.close()
    log = MetricsLog(tmp_path, resume_step=10)
    log.write(10, 80, {"knn": 0.7, "held_out_loss": 0.6})
    log.close()
    names = [set(record) - {"step", "samples", "time", "hours"} for record in read_records(tmp_path)]
    assert names == [{"loss"}, {"knn"}, {"held_out_loss"}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = RunTracker(tmp_path / "run", TrackingConfig(), is_main=False)
    tracker.start({}, {})
    tracker.log(1, 1, {"loss": 1.0})
    tracker.artifact(tmp_path / "x")
    tracker.message("hello")
    tracker.flush()
    tracker.finish("done")
    assert not (tmp_path / "run").exists()


def test_first_and_last_step_are_due() -> None:
    tracker = RunTracker("unused", TrackingConfig(log_every=10), is_main=True)
    assert [step for step in range(1, 26) if tracker.due(step, last_step=25)] == [1, 10, 20, 25]


def test_speed_meter_counts_steps_and_waiting() -> None:
    now = 0.0

    def clock() -> float:
        return now

    meter = SpeedMeter(clock)
    for _ in range(4):
        with meter.waiting("data"):
            now += 0.5
        now += 1.5
        meter.step()
    assert meter.read() == {"step_seconds": 2.0, "data_wait_share": 0.25}
    now += 1.0
    meter.step()
    assert meter.read() == {"step_seconds": 1.0}


def test_a_pause_is_in_no_rate() -> None:
    now = 0.0
    meter = SpeedMeter(lambda: now)
    for _ in range(2):
        with meter.waiting("data"):
            now += 0.5
        now += 0.5
        meter.step()
        with meter.paused():
            now += 60
    assert meter.read() == {"step_seconds": 1.0, "data_wait_share": 0.5}


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(100)
    terminal.record({"step": 10, "loss": 0.51234, "data_wait_share": 0.02, "host_memory_gib": 3.0})
    terminal.record({"step": 20, "knn_accuracy": 0.8})
    terminal.record({"step": 30, "test/accuracy": 0.97, "test/samples": 360})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 10/100  loss 0.5123  data wait 2.0%"
    assert lines[1].startswith("step 20/100  k-NN 0.8  eta 0:00:00")
    assert lines[2].startswith("step 30/100  held-out accuracy 97.0%  eta")


def test_a_log_file_on_a_full_disk_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr("sys.stdout", full)
    terminal = Terminal(100, live=False)
    terminal.record({"step": 10, "loss": 0.5})
    terminal.message("hello")
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.parametrize("columns", [60, 200])
def test_live_view_shows_everything_at_any_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal = Terminal(100, live=True)
    values = {"loss": 0.5, "samples_per_second": 364.8, "mfu": 0.41, "data_wait_share": 0.02, "decay": 0.99, "lr": 1e-3}
    terminal.record({"step": 10, **values})
    terminal.record({"step": 10, "knn_accuracy": 0.75})
    terminal.message("a [bracketed] message")
    terminal.checkpoint(50)
    terminal.record({"step": 80, **values, "loss": 0.25})
    terminal.close()
    output = capsys.readouterr().out
    assert "a [bracketed] message" in output
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output[output.rindex("80/100") - 40 :])
    for shown in ("80/100", "loss 0.25", "k-NN 0.75", "samples/s 364.8", "mfu 41.0%", "data wait 2.0%", "eta 0:00:"):
        assert shown in " ".join(last.split()), (shown, last)
    assert "checkpoint 50" in " ".join(last.split())


def test_flatten_names_nested_keys() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}, "f": "x"}) == {
        "a.b": "1",
        "a.c": "[1, 2]",
        "d": "null",
        "e": "{}",
        "f": "x",
    }


def test_a_full_disk_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, 1, {"loss": 1.0})
    real = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    log.write(2, 2, {"loss": 1.0})
    assert log.trouble is not None
    monkeypatch.setattr(os, "write", real)
    log.write(3, 3, {"loss": 1.0})
    assert log.trouble is None
    log.close()
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.usefixtures("drawing")
def test_null_draws_no_curves_at_the_end(tmp_path: Path) -> None:
    config = TrackingConfig(enabled=False, plot_every=None)
    ranges.check(config)
    tracker = RunTracker(tmp_path, config, is_main=True)
    tracker.start({}, {})
    tracker.log(1, 1, {"loss": 1.0})
    tracker.finish("done")
    assert not (tmp_path / "plots" / "health.png").exists()


@pytest.mark.usefixtures("drawing")
def test_curves_are_drawn_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    tracker = RunTracker(tmp_path, TrackingConfig(enabled=False, plot_every=5), is_main=True)
    tracker.start({}, {})
    for step in range(1, 12):
        tracker.log(step, step, {"loss": 1 / step})
    deadline = time.monotonic() + 60
    while not (tmp_path / "plots" / "health.png").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (tmp_path / "plots" / "health.png").unlink()
    tracker.finish("done")
    assert (tmp_path / "plots" / "health.png").exists()
    events = (tmp_path / "mlflow_events.jsonl").read_text()
    assert "plots/health.png" in events
    assert "status" in events.splitlines()[-1]
