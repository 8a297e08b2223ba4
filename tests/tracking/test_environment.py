import os
import subprocess
from pathlib import Path

import pytest

from d2v_scale.tracking.environment import git_revision

ROOT = Path(__file__).resolve().parents[2]
GIT = ("git", "-c", "user.name=n", "-c", "user.email=e")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A source tree with one commit."""
    root = tmp_path / "repository"
    for folder in ("d2v_scale", "ds_configs", "slurm", "tools"):
        (root / folder).mkdir(parents=True)
        (root / folder / "file").write_text("1\n")
    (root / "pyproject.toml").write_text("")
    (root / "slurm" / "lib.sh").write_text((ROOT / "slurm" / "lib.sh").read_text())
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*GIT, *command], cwd=root, check=True)
    return root


def snapshot(repository: Path, run_dir: Path) -> Path:
    """What a Slurm job makes of the tree."""
    run_dir.mkdir()
    script = f"source {repository}/slurm/lib.sh; repository={repository} run_dir={run_dir}; snapshot_code"
    subprocess.run(["bash", "-c", script], env={**os.environ, "SLURM_JOB_ID": "7"}, check=True)
    return run_dir / "code" / "7"


def test_a_slurm_job_knows_its_revision(repository: Path, tmp_path: Path) -> None:
    clean = git_revision(repository)
    assert len(clean) == 12
    (repository / "notes.txt").write_text("not tracked\n")
    assert git_revision(snapshot(repository, tmp_path / "clean")) == clean
    (repository / "tools" / "file").write_text("2\n")
    assert git_revision(repository) == f"{clean}-dirty"
    assert git_revision(snapshot(repository, tmp_path / "dirty")) == f"{clean}-dirty"


def test_without_git_there_is_no_revision(repository: Path, tmp_path: Path) -> None:
    (repository / ".git").rename(tmp_path / "elsewhere")
    assert git_revision(repository) == "unknown"
    assert git_revision(snapshot(repository, tmp_path / "run")) == "unknown"
