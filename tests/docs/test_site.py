"""The pages build as a site without a warning, and all of them are in it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
if importlib.util.find_spec("mkdocs") is None:
    pytest.skip("the extra `docs` is not installed: pip install -e '.[docs]'", allow_module_level=True)


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [page if isinstance(page, str) else next(iter(page.values())) for page in config["nav"]]
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= {*pages}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in pages:
        name = page.removesuffix(".md").replace("README", "")
        assert (tmp_path / "site" / name / "index.html").is_file(), page
    api = (tmp_path / "site" / "docs" / "api" / "index.html").read_text()
    text = re.sub(r"<[^>]+>", "", api)
    for name in ("load_encoder", "embed", "layers", "train", "global_batch_size", "ConfigError"):
        assert name in text
    assert [path.name for path in tmp_path.iterdir()] == ["site"], "nothing is left behind"


def test_a_dead_link_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n[b](nowhere.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ntheme: {name: material}\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr
