import json
from pathlib import Path

import pytest
import torch

from d2v_scale.data.batch import Batch
from d2v_scale.tracking import RunTracker, TrackingConfig


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
    )
    started(tmp_path).preview(batch)
    assert (tmp_path / "plots" / "first_batch.png").exists() is not broken
    assert ("was not drawn" in capsys.readouterr().out) is broken
    assert len(events(tmp_path, "artifact")) == (0 if broken else 1)
