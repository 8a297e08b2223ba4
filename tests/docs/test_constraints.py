"""constraints/*.txt hold every direct dependency, in a version that pyproject.toml allows, and nothing but versions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "constraints.py"


def pinned(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert lines == sorted({*lines})
    return dict(line.split("==") for line in lines)


def direct() -> list[Requirement]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["test"]]


@pytest.mark.parametrize("name", ["newest", "oldest"])
def test_each_direct_dependency_is_pinned_to_what_is_allowed(name: str) -> None:
    found = pinned(ROOT / "constraints" / f"{name}.txt")
    for requirement in direct():
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement
    assert not [package for package in found if re.match(r"nvidia-(?!ml-py)|triton", package)]


def test_the_oldest_are_the_lower_bounds() -> None:
    found = pinned(ROOT / "constraints" / "oldest.txt")
    for requirement in direct():
        for bound in requirement.specifier:
            if bound.operator == ">=":
                have = found[canonicalize_name(requirement.name)]
                assert have == bound.version or have.startswith(f"{bound.version}."), requirement


def test_the_newest_are_those_that_are_installed(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "newest", "--out", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = pinned(tmp_path / "newest.txt")
    assert f"{len(found)} packages" in said
    from importlib.metadata import version

    assert found["torch"] == version("torch").partition("+")[0]
    assert {canonicalize_name(one.name) for one in direct()} <= {*found}
