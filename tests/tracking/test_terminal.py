"""What is seen of a run at a terminal: one display, through which log lines go, too."""

import io
import logging
import re
import sys

import pyte
import pytest
from rich.console import Console

from d2v_scale.tracking.terminal import Terminal


def test_a_log_line_does_not_leave_a_stale_bar_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loggers kept the terminal that they had been given: their lines were drawn over, and bars stayed above them."""

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "__stdout__", out)
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(sys, "__stderr__", out)
    monkeypatch.setattr("rich.get_console", lambda: Console(file=None, force_terminal=True, width=80, height=24))
    handler = logging.StreamHandler(out)
    logger = logging.getLogger()
    monkeypatch.setattr(logger, "handlers", [handler])
    terminal = Terminal(100, live=True)
    for step in range(0, 101, 10):
        terminal.record({"step": step, "loss": 1 / (1 + step)})
        if step in (30, 60):
            logging.getLogger("d2v_scale.test").warning("checkpoint of step %d committed", step)
            terminal.checkpoint(step)
    terminal.checkpoint(100)  # after the last record, as a run has it: step 60 stayed there
    terminal.close()
    assert handler.stream is out
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    shown = [line.rstrip() for line in screen.display if line.strip()]
    assert shown[:2] == ["checkpoint of step 30 committed", "checkpoint of step 60 committed"]
    assert len([line for line in shown if re.search(r"step\s+\d+/100", line)]) == 1
    assert "100/100" in shown[2]
    assert "checkpoint 100" in " ".join(" ".join(shown[3:]).split())


def test_figures_of_fine_tuning_are_shown_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """They were in the record only, while k-NN accuracy was shown."""
    terminal = Terminal(100, live=False)
    terminal.record({"step": 50, "test/matthews": 0.4321, "test/samples": 64.0})
    terminal.record({"step": 60, "loss": 1.5, "data/lost": 0.0})
    assert capsys.readouterr().out.splitlines()[0].startswith("step 50/100  held-out matthews 0.4321")
