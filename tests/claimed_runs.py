"""Run directories that are claimed as `train` claims them, one after another in one process."""

from pathlib import Path
from typing import Any

import pytest

from d2v_scale.command_line import parse
from d2v_scale.parallel import groups
from d2v_scale.running import run_directory

CONFIG: dict[str, Any] = {"zero_optimization": {"stage": 1}}


@pytest.fixture(autouse=True)
def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every claim is another program's."""
    monkeypatch.setattr(run_directory, "lock", lambda run_dir: None)


def claim(run_dir: Path, *arguments: str) -> Path:
    """Claim `run_dir` with these arguments of the command line."""
    recipe, options = parse([*arguments, *([] if "--resume" in arguments else ["--run_dir", str(run_dir)])])
    return run_directory.claim(recipe, options, CONFIG, groups.single_process())
