"""The rooms of the package: few modules lie beside them, and no name hides another package."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "d2v_scale"

ELSEWHERE = {"distributed", "docs", "golden", "slurm", "tools"}
"""Folders of tests that are not named after a room."""


def rooms() -> set[str]:
    return {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_at_most_a_dozen_modules_lie_beside_the_rooms() -> None:
    loose = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    assert len(loose) <= 12, loose


def test_no_name_hides_a_module_of_python_or_of_a_package() -> None:
    # `deepspeed d2v_scale/train.py` and the commands in tools/ put their own folder first on the path.
    scripts = {path.stem for folder in (PACKAGE, ROOT / "tools") for path in folder.glob("*.py")}
    names = (scripts | rooms()) - {"__init__", "__main__"}
    assert names & (set(sys.stdlib_module_names) | set(packages_distributions())) == set()


def test_tests_lie_in_folders_named_after_rooms() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert folders - rooms() == ELSEWHERE
