"""The demo recipes teach their teachers something: k-NN accuracy rises above that of the random start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "gain", "rank"),
    [("vision", 0.2, 5.0), ("speech", 0.02, 2.0), ("text", 0.04, 5.0), ("video", 0.05, 2.0)],
)
def test_knn_accuracy_rises(modality: str, gain: float, rank: float, tmp_path: Path) -> None:
    """Once the text demo had ended where it began, its targets shrunk to five directions. Those of the speech demo
    shrink from 22 to two or three, in which its words are told apart all the same (k-NN from .48 to .77)."""
    if modality == "speech":
        pytest.importorskip("espeakng_loader")
    command = [sys.executable, str(ROOT / "d2v_scale" / "train.py"), "--recipe", f"demo_{modality}"]
    command += ["--run_dir", "run", "--tracking.enabled", "false", "--data.workers", "0"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = [record["knn_accuracy"] for record in records if "knn_accuracy" in record]
    ranks = [record["target_rank"] for record in records if "target_rank" in record]
    assert accuracies[-1] > accuracies[0] + gain
    assert ranks[-1] > rank
