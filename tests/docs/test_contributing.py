"""CONTRIBUTING.md: its commands are those of tools/test.sh, and its examples are followed in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import papers
import pytest
from launch import PROCESS

ROOT = papers.ROOT
TEXT = (ROOT / "CONTRIBUTING.md").read_text()

# Commands that are neither a line of tools/test.sh nor a way to call it, and why they are not run here.
ELSEWHERE = {
    "bash tools/install.sh demo,test": "tools/test.sh begins with it",
    "export PATH=$PWD/.venv/bin:$PATH": "tools/test.sh does the same",
    "python -m pytest tests/data2vec": "tools/test.sh runs all of them",
}
PLAN = "python tools/plan.py --recipe small_vision64 --nodes 1 --gpus 8 --device h100"

RUNNER = """
import runpy, sys
end = sys.argv.index("tools/plan.py")
for path in sys.argv[1:end]:
    print("RUNNING", path, flush=True)
    runpy.run_path(path)
sys.argv = sys.argv[end:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""One process for everything, since it imports as long as it runs."""


def sections() -> dict[str, str]:
    """The text below each heading."""
    parts = re.split(r"^## (.*)\n", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_its_commands_are_those_of_the_checks() -> None:
    script = (ROOT / "tools" / "test.sh").read_text()
    lines = {line.strip() for line in script.splitlines()}
    for command in papers.commands(TEXT):
        assert papers.missing_files(command) == []
        if command.startswith("bash tools/test.sh"):
            assert all(f"{option})" in script for option in command.split()[2:]), command
        else:
            assert command in lines or command in ELSEWHERE or command == PLAN, command
    assert "bash tools/install.sh demo,test" in lines


def test_every_file_that_it_names_exists() -> None:
    named = set(re.findall(r"`((?:d2v_scale|tests|tools|docs)/[\w/.-]+)`", TEXT))
    assert len(named) > 20
    created = {"d2v_scale/recipes/small_vision64.yaml"}
    assert [name for name in sorted(named - created) if not (ROOT / name).exists()] == []


def test_the_tour_visits_every_package() -> None:
    tour = sections()["The tour, as data flows"]
    packages = {path.parent.name for path in (ROOT / "d2v_scale").glob("*/__init__.py")}
    assert [name for name in sorted(packages) if f"{name}/" not in tour] == []
    # A name in the paragraph of a package is a file of it, of another that it is said to be in, or at the root.
    files = {path.name for path in (ROOT / "d2v_scale").rglob("*.py")}
    named = set(re.findall(r"`(?!tools/)(?:[\w/]+/)?(\w+\.py)`", tour))
    assert named <= files


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tools, with all examples applied."""
    root = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("d2v_scale", "tools", "ds_configs"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    for diff in papers.blocks(TEXT, "diff"):
        papers.apply(diff, root)
    for recipe in papers.blocks(TEXT, "yaml"):
        (root / recipe.partition("\n")[0].removeprefix("# ")).write_text(recipe)
    for title, text in sections().items():
        if programs := papers.blocks(text, "python"):
            name = title.lower().replace(" ", "_")
            # Blocks of one section go on from each other.
            (root / f"{name}.py").write_text("\n\n".join(programs))
    return root


def test_its_examples_run_where_its_changes_were_made(copy: Path) -> None:
    programs = sorted(str(path) for path in copy.glob("add_*.py"))
    assert len(programs) == sum("```python" in text for text in sections().values()) >= 4
    assert papers.commands(sections()["Add a recipe"]) == [PLAN]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *programs, *PLAN.split()[1:]],
        cwd=copy,
        env={**os.environ, **PROCESS, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "masks a sample" in done.stdout, "the recipe that was added is planned"


def test_its_examples_pass_the_lint(copy: Path) -> None:
    changed = list(re.findall(r"^--- (\S+)", TEXT, re.MULTILINE))
    examples = [path.name for path in copy.glob("add_*.py")]
    # A section's blocks are one program here: imports stand where their block begins.
    command = [sys.executable, "-m", "ruff", "check", "--ignore", "E402,I001", *changed, *examples]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_diff_that_does_not_fit_is_refused() -> None:
    assert papers.edited("a\nb\nc\n", " a\n-b\n+d\n") == "a\nd\nc\n"
    with pytest.raises(AssertionError, match="0 times"):
        papers.edited("a\n", "-b\n+c\n")
