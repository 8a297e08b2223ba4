"""Tools as a user runs them."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a tool's `main` in this process; returns what it printed."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def call(tool: str, *arguments: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        code = importlib.import_module(tool).main()
        printed = capsys.readouterr()
        assert code == status, printed.err
        return printed.out + printed.err

    return call
