"""Files and modules that papers, scripts, templates and recipes name are there."""

import re
from collections.abc import Iterator
from pathlib import Path

import papers
import pytest

ROOT = papers.ROOT
FOLDERS = ("d2v_scale", "tools", "tests", "slurm", "ds_configs", "docs", ".ci", ".github")
PATH = re.compile(r"(?<![\w/.$}*-])((?:d2v_scale|tools|tests|slurm|ds_configs|docs)/[\w/.*{}-]*[\w*}/])(?!\w*[$<{*])")
MODULE = re.compile(r"(?<![\w/.-])d2v_scale((?:\.[A-Za-z_]\w*)+)(?!\w*[$<{*])")
ROOM = re.compile(r"`((?:[a-z]\w*/)+\w+\.py)`")
MADE_BY_USERS = {"ds_configs/NAME", "ds_configs/NAME.json", "slurm/site.env"}
FILES = {"d2v_scale.json", "d2v_scale.sif", "d2v_scale.sqsh"}
"""What is called as the package and lies elsewhere: the note of an export, containers of a site."""


def texts() -> Iterator[tuple[Path, str]]:
    """Every paper, script and template, and the modules, whose docstrings and comments name files, too. What has been
    stands in the changelog, what tests make up in tests."""
    places = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    for path in sorted(places):
        named = path.suffix in (".md", ".sh", ".yaml", ".yml", ".example") or path.parent.name == ".ci"
        code = path.suffix == ".py" and path.is_relative_to(ROOT / "d2v_scale")
        if path.is_file() and (named or code) and path.name != "CHANGELOG.md":
            yield path, path.read_text()


def missing(text: str, created: set[str] = frozenset()) -> list[str]:
    """What `text` names and is not there, nor among what it creates itself."""
    paths = [name for name in PATH.findall(text) if not set(name) & set("*{}")]
    paths += [name for name in ROOM.findall(text) if not (ROOT / name).exists()]
    known = created | MADE_BY_USERS
    gone = [name for name in paths if name not in known and not any(_at(name))]
    dotted = (f"d2v_scale{tail}" for tail in MODULE.findall(text))
    return gone + [name for name in dotted if name not in FILES and not _resolves(name, created)]


def _at(name: str) -> Iterator[bool]:
    yield (ROOT / name).exists()
    yield (ROOT / "d2v_scale" / name).exists()


def _resolves(name: str, created: set[str]) -> bool:
    """Whether a dotted name leads to a module, and where it goes on to a name that stands in it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = "/".join(parts[:end])
        if f"{module}.py" in created:
            return True
        for path in (ROOT / f"{module}.py", ROOT / module / "__init__.py"):
            if path.exists():
                inside = parts[end : end + 1]
                return not inside or inside[0].startswith("__") or re.search(rf"\b{inside[0]}\b", path.read_text())
    return False


def created_by(text: str) -> set[str]:
    """Files that the examples of a paper write."""
    return set(re.findall(r"^(?:---|#) (d2v_scale/\S+)$", text, re.MULTILINE))


def test_every_file_and_module_that_is_named_is_there() -> None:
    found = {str(path.relative_to(ROOT)): missing(text, created_by(text)) for path, text in texts()}
    assert len(found) > 300
    assert {name: gone for name, gone in found.items() if gone} == {}


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("see d2v_scale/data/rows.py", ["d2v_scale/data/rows.py"]),
        ("in `data/rows.py`, `shards/rows.py`", ["data/rows.py"]),
        ("python -m d2v_scale.data.rows", ["d2v_scale.data.rows"]),
        ("`d2v_scale.shards.rows.Decoder` and d2v_scale.shards.rows.Nothing", ["d2v_scale.shards.rows.Nothing"]),
        ("ds_configs/*.json, $D/tools/none.py, https://a.b/tools/none.py", []),
        ("sbatch slurm/none.sh", ["slurm/none.sh"]),
    ],
)
def test_what_is_not_there_is_found(text: str, gone: list[str]) -> None:
    assert missing(text) == gone
