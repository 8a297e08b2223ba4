"""How long a run takes to its first step."""

import shutil
from pathlib import Path

import pytest

from d2v_scale.benchmarks import startup
from d2v_scale.errors import UserError


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("deepspeed") is None, reason="needs DeepSpeed's launcher")
def test_the_first_step_comes_within_twice_an_empty_jobs_time(tmp_path: Path) -> None:
    ours, empty = startup.measure(tmp_path, ranks=2, rounds=2, limit_s=600)
    assert min(a / b for a, b in zip(ours, empty, strict=True)) <= 2


def test_a_job_that_fails_is_reported_with_its_output(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no luck')")
    with pytest.raises(UserError, match="no luck"):
        startup._until([str(script)], tmp_path / "never", 1, 120, tmp_path)
