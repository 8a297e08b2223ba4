"""What may import what: no module is needed to import itself, and rooms do not look into each other.

A room is a folder of the package, or a module beside the folders. A room's `config.py` is settings, which every room
may read: it counts as a room of its own. Imports inside functions and for type checkers only do not count.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import d2v_scale

PACKAGE = Path(d2v_scale.__file__).parent

KNOWN = {
    ("evaluation", "interop"): "exports are checked with the frozen encoder, which reads exports",
    ("evaluation", "plots"): "pictures are drawn of neighbours, and evaluation hands over what is drawn",
    ("finetuning", "interop"): "task models are exported, and begin from what was imported",
    ("modalities", "plots"): "a modality draws its samples on the common canvas",
}
"""Pairs of rooms that import each other, and why. A new pair needs a better cut rather than a line here."""


def modules(root: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name, the package itself included."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def run_on_import(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module that importing it runs, without functions."""
    for node in body:
        if isinstance(node, ast.If):
            chosen = any(name in ast.unparse(node.test) for name in ("TYPE_CHECKING", "__main__"))
            yield from run_on_import([*([] if chosen else node.body), *node.orelse])
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            yield from run_on_import(node.body)
        else:
            yield node


def imports(root: Path) -> dict[str, set[str]]:
    """For every module of a package those of the package that it imports."""
    known = modules(root)
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        found[module] = set()
        for node in run_on_import(ast.parse(path.read_text()).body):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in known else node.module for name in names}
    return found


def a_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The names along one circle of a graph; [] where it has none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        circles = (search(other, [*path, name]) for other in sorted(graph.get(name, ())))
        circle = next((one for one in circles if one), [])
        done.add(name)
        return circle

    return next((circle for name in sorted(graph) if (circle := search(name, []))), [])


def room(module: str) -> str:
    """The room of a module, by its place alone."""
    _, *inside = module.split(".")
    return f"{inside[0]}.config" if inside[-1:] == ["config"] and len(inside) > 1 else "".join(inside[:1])


def pairs(graph: Mapping[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """Rooms that import each other, each pair once and in order, with the imports that do it."""
    between: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, others in graph.items():
        for other in others:
            between[room(module), room(other)].append(f"{module} -> {other}")
    settings = [pair for pair in between if pair[0] + ".config" == pair[1] or pair[1] + ".config" == pair[0]]
    for pair in settings:
        del between[pair]
    return {(a, b): between[a, b] + between[b, a] for a, b in sorted(between) if a < b and (b, a) in between}


def test_no_module_needs_itself() -> None:
    circle = a_circle(imports(PACKAGE))
    assert not circle, " -> ".join(circle)


def test_rooms_do_not_look_into_each_other() -> None:
    there = pairs(imports(PACKAGE))
    new = {pair: found for pair, found in there.items() if pair not in KNOWN}
    assert not new, new
    assert not KNOWN.keys() - there.keys(), "these do not import each other any more"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package whose rooms `up` and `down` import each other, in modules that do not."""
    for name, text in {
        "__init__": "",
        "up/__init__": "",
        "up/first": "from house.down import second\nfrom house.down.config import A\n",
        "up/third": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.down import fourth\n",
        "down/__init__": "",
        "down/config": "A = 1\n",
        "down/second": "def late():\n    import house.up.first\n",
        "down/fourth": "import house.up.third\nfrom house.down.config import A\n",
    }.items():
        path = tmp_path / "house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "house"


def test_circles_are_found_where_there_are_some(house: Path) -> None:
    graph = imports(house)
    assert graph["house.up.first"] == {"house.down.second", "house.down.config"}
    assert (graph["house.up.third"], graph["house.down.second"]) == (set(), set())
    assert not a_circle(graph)
    assert list(pairs(graph)) == [("down", "up")]
    (house / "down" / "config.py").write_text("import house.down.fourth\n")
    assert a_circle(imports(house)) == ["house.down.config", "house.down.fourth", "house.down.config"]
