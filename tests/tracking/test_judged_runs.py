"""The verdict on real runs: some spoiled on purpose, some healthy, as `judged_runs` made and recorded them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import judged_runs
import pytest

from d2v_scale.tracking.verdict import signs, verdict

RECORDED = json.loads(judged_runs.RECORDED.read_text())


@pytest.mark.parametrize("name", [name for name in judged_runs.BAD if name in RECORDED])
def test_what_was_spoiled_is_named(name: str) -> None:
    run = judged_runs.BAD[name]
    found = [sign.name for sign in signs(judged_runs.rows(RECORDED[name]))]
    assert set(run.signs) <= set(found), found
    assert set(found) <= {*run.signs, *run.also}, found


@pytest.mark.parametrize("name", [name for name in judged_runs.GOOD if name in RECORDED])
def test_a_healthy_run_is_called_so(name: str) -> None:
    assert verdict(judged_runs.rows(RECORDED[name])) == "Healthy: none of the signs of trouble is there."


@pytest.mark.slow
def test_a_spoiled_and_a_healthy_run_made_anew_are_told_apart(tmp_path: Path) -> None:
    made = tmp_path / "made.json"
    names = ("masks that hide next to nothing, video", "video")
    command = [sys.executable, judged_runs.__file__, "--out", str(made), str(tmp_path / "runs"), *names]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
