"""Every name that a tool takes from the package is there: most are imported inside functions, when a long run ends."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).parents[2] / "tools").glob("*.py"))


def taken(path: Path) -> Iterator[tuple[str, str]]:
    """Module of the package and name, of every `from d2v_scale... import ...` in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "d2v_scale":
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_what_a_tool_imports_exists(path: Path) -> None:
    for module, name in taken(path):
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
