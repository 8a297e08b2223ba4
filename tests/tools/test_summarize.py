import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import summarize


def test_a_record_whose_last_line_is_torn_is_summarized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"step": 1, "loss": 2.0, "knn_accuracy": 0.25}, {"step": 9, "loss": 0.5, "knn_accuracy": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10, "lo')
    assert summarize.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "first 2.0000, last 0.5000" in printed
    assert "before 0.250, after 0.750" in printed


def test_a_folder_that_is_no_run_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summarize.main([str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
