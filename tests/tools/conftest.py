"""Tools as a user runs them."""

import importlib
from collections.abc import Callable

import pytest


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a tool's `main` in this process; returns what it printed."""

    def call(tool: str, *arguments: object, status: int = 0) -> str:
        code = importlib.import_module(f"d2v_scale.commands.{tool}").main([*map(str, arguments)])
        printed = capsys.readouterr()
        assert code == status, printed.err
        return printed.out + printed.err

    return call
