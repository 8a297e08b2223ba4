"""Links between the papers lead to files and headings that exist; what they state of the project is so."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import d2v_scale

ROOT = Path(__file__).parents[2]
PAPERS = sorted(
    path
    for folder in (".", "docs", "slurm", "ds_configs", "d2v_scale/recipes")
    for path in (ROOT / folder).glob("*.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(paper: Path) -> list[str]:
    dead = []
    for link in LINK.findall(paper.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = paper.parent / name if name else paper
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(link)
    return dead


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(paper: Path) -> None:
    assert dead_links(paper) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    paper = tmp_path / "a.md"
    paper.write_text("# One thing\n[a](b.md) [b](#one-thing) [c](#two) [d](https://x.y)\n")
    assert dead_links(paper) == ["b.md", "#two"]


def test_the_citation_is_of_this_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for key, stated in (("title", "name"), ("version", "version"), ("license", "license"), ("abstract", "description")):
        assert citation[key] == project[stated]
    assert {"cff-version", "message", "authors"} <= set(citation)
    assert d2v_scale.__version__ == project["version"]


def test_the_changelog_is_by_version_and_kind() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    versions = re.findall(r"^## (\d+\.\d+\.\d+)(?: \(unreleased\))?$", text, re.MULTILINE)
    assert len(versions) == len(re.findall(r"^## ", text, re.MULTILINE))
    assert version in versions[:2], "the version is the newest, or the one before what is not released"
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert kinds == ["Added", "Changed", "Fixed"] * len(versions)


def test_the_licence_is_filled_in() -> None:
    assert "[yyyy]" not in (ROOT / "LICENSE").read_text()
