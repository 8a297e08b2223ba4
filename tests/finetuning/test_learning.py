"""Fine-tuning learns: handwritten digits, through the training program."""

import json
from pathlib import Path

import pytest
from launch import ROOT, run_ranks

TRAIN = ROOT / "d2v_scale" / "train.py"


@pytest.mark.slow
def test_digits_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"recipe": "finetune_digits", "run_dir": tmp_path / "run", "tracking.enabled": False}
    run_ranks(1, TRAIN, *(text for name, value in options.items() for text in (f"--{name}", str(value))), timeout=600)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    accuracy = [record["test/accuracy"] for record in records if "test/accuracy" in record]
    assert accuracy[0] < 0.2
    assert accuracy[-1] > 0.93
