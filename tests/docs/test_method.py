"""docs/method.md: what comments cite of it is there, and what it says of names and sizes is so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHOD = ROOT / "docs" / "method.md"
FOLDERS = ("d2v_scale", "tools", "tests", "slurm", "ds_configs")

NUMBER = r"[A-Z]?\d+(?:\.\d+)?"
CITATION = re.compile(rf"\bspec(?:ification)?,? (?:section |§ ?)?({NUMBER}(?:(?:, | and |-){NUMBER})*)")
INNER = re.compile(r"\((\d\.[1-9](?:,\s\d\.[1-9])*)\)")
TENSOR = re.compile(r"\b(Tensor|NDArray|ndarray|Bools|Floats|Numbers|Wave)\b")
CONTAINER = re.compile(r"\b(list|dict|tuple|Sequence|Mapping|Callable|Iterable|Iterator)\b")
WORDS = {"bias", "ids", "x"}
"""Ends of names that are no axes."""


def sections() -> set[str]:
    return set(re.findall(r"^##+ (\d(?:\.\d)?) ", METHOD.read_text(), re.MULTILINE))


def cited(text: str) -> list[str]:
    return [number for found in CITATION.findall(text) for number in re.findall(NUMBER, found)]


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md", ".yaml", ".sh") and path != Path(__file__):
                yield path


def test_every_citation_in_the_tree_has_its_section() -> None:
    found = [(str(path.relative_to(ROOT)), number) for path in sources() for number in cited(path.read_text())]
    assert len(found) > 40, "citations are no longer found"
    missing = [place for place in found if place[1] not in sections()]
    assert missing == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("as they are (spec 1.2).", ["1.2"]),
        ("(spec 7.1, 7.2)", ["7.1", "7.2"]),
        ("(spec section 2)", ["2"]),
        ("(spec 1.9)", ["1.9"]),
        ("(spec S32: before any crop)", ["S32"]),
        ("for spec in wanted: spec.length", []),
    ],
)
def test_a_citation_is_read(text: str, numbers: list[str]) -> None:
    assert cited(text) == numbers
    assert {"1.2", "7.1", "7.2", "2"} <= sections()
    assert not {"1.9", "S32", "10"} & sections()


def test_its_own_references_resolve() -> None:
    inner = [number for found in INNER.findall(METHOD.read_text()) for number in re.split(r",\s", found)]
    assert len(inner) > 10
    assert set(inner) <= sections()


def letters() -> set[str]:
    table = METHOD.read_text().partition("## Shape letters")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([A-Z](?:, [A-Z])*) \|", table, re.MULTILINE)
    return {letter.lower() for row in rows for letter in row.split(", ")}


def axes_of_names(source: str) -> Iterator[tuple[str, str]]:
    """Name and axes of whatever is annotated as one tensor or array."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg) and node.annotation is not None:
            name, annotation = node.arg, ast.unparse(node.annotation)
        elif isinstance(node, ast.AnnAssign):
            target = node.target
            name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")
            annotation = ast.unparse(node.annotation)
        else:
            continue
        found = re.search(r"_([a-z0-9]{1,4})$", name)
        if found and found[1] not in WORDS and TENSOR.search(annotation) and not CONTAINER.search(annotation):
            yield name, found[1]


def test_every_letter_of_a_shape_is_in_the_table_and_every_one_there_is_used() -> None:
    used: set[str] = set()
    unknown = []
    for path in sorted((ROOT / "d2v_scale").rglob("*.py")):
        for name, axes in axes_of_names(path.read_text()):
            named = {letter for letter in axes if letter.isalpha()}
            used |= named
            if not named <= letters():
                unknown.append((path.name, name))
    assert unknown == []
    assert letters() == used


def test_an_unknown_letter_is_found() -> None:
    [(name, axes)] = axes_of_names("def f(states_bzd: Tensor, x: Tensor, sizes_bz: list[int]) -> None: ...")
    assert (name, axes) == ("states_bzd", "bzd")
    assert not set(axes) <= letters()


def test_the_parameter_counts_are_those_that_are_tested() -> None:
    tested = (ROOT / "tests/model/test_parameter_counts.py").read_text()
    counts = {int(number.replace("_", "")) for number in re.findall(r"\b\d{1,3}(?:_\d{3})+\b", tested)}
    table = METHOD.read_text().partition("### 3.8")[2].partition("\n## ")[0]
    stated = {int(number.replace(",", "")) for number in re.findall(r"\d{1,3}(?:,\d{3})+", table)}
    assert len(stated) > 15
    assert stated <= counts
