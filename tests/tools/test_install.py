"""tools/install.sh: an environment belongs to one tree."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_an_environment_that_is_linked_is_not_turned_to_another_tree(tmp_path: Path) -> None:
    """The editable install of a linked environment would move to the tree that holds the link."""
    tree, environment = tmp_path / "tree", tmp_path / "environment"
    (tree / "tools").mkdir(parents=True)
    for name in ("tools/install.sh", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree / name)
    (environment / "bin").mkdir(parents=True)
    called = environment / "bin" / "python"
    called.write_text(f"#!/bin/sh\ntouch {tmp_path}/installed\n")
    called.chmod(0o755)
    (tree / ".venv").symlink_to(environment)
    ended = subprocess.run(["bash", "tools/install.sh", "demo"], cwd=tree, capture_output=True, text=True)
    assert ended.returncode == 2
    assert f".venv is a link to {environment}" in ended.stderr
    assert not (tmp_path / "installed").exists()
    (tree / ".venv").unlink()
    environment.rename(tree / ".venv")
    assert subprocess.run(["bash", "tools/install.sh", "demo"], cwd=tree, capture_output=True).returncode == 0
    assert (tmp_path / "installed").exists()
