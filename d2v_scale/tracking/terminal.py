"""What a person sees of a run: a live view at a terminal, plain lines in a log file."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from d2v_scale.tracking.figure_names import figure_name
from d2v_scale.tracking.names import by_stem, scores

_SHOWN = ("loss", "knn_accuracy", "samples_per_second", "mfu", "data_wait_share", "decay", "lr")
_OF_STEMS = ("loss", "knn_accuracy")
"""Of these, what stems and sources have of their own, too."""
_LABELS = {"samples_per_second": "samples/s", "data_wait_share": "data wait", "knn_accuracy": "k-NN"}


class Terminal:
    """Prints records. `message` is for everything else that a person should read."""

    def __init__(self, total_steps: int | None, live: bool | None = None) -> None:
        """`live`: a bar and the newest values below it; default: if stdout is a terminal."""
        self._total = total_steps
        self._shown: dict[str, float] = {}
        self._checkpoint = ""
        self._started: tuple[float, int] | None = None
        self._live: Any = None
        self._diverted: list[tuple[logging.StreamHandler[Any], Any]] = []
        if sys.stdout.isatty() if live is None else live:
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            bar = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20))
            self._progress = Progress(*bar, TextColumn("{task.fields[eta]}"), TextColumn("after"), TimeElapsedColumn())
            self._task = self._progress.add_task("", total=total_steps, eta="")
            self._live = Live(self._progress, refresh_per_second=4)
            self._live.start()
            self._diverted = _divert_logs()

    def record(self, record: Mapping[str, Any]) -> None:
        """Show one record of metrics.jsonl. Values not in it keep their last reading at a terminal."""
        step = record["step"]
        self._started = self._started or (time.monotonic(), step)
        of_stems = [name for figure in _OF_STEMS for name in by_stem(record, figure).values()]
        names = (*_SHOWN[:1], *scores(record), *_SHOWN[1:], *of_stems)
        fresh = {name: record[name] for name in names if name in record}
        self._shown |= fresh
        if self._live is not None:
            self._progress.update(self._task, completed=step, eta=self._eta(step))
            self._draw()
        elif fresh:  # other lines say nothing that a log needs
            of = f"/{self._total}" if self._total else ""
            parts = [f"step {step}{of}", *_formatted(fresh), self._eta(step)]
            _print("  ".join(part for part in parts if part))

    def message(self, text: str) -> None:
        """One line above the live display."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            _print(text)

    def checkpoint(self, step: int) -> None:
        """The newest committed checkpoint is of this step; shown in a live display."""
        self._checkpoint = f"checkpoint {step}"
        if self._live is not None:
            self._draw()

    def close(self) -> None:
        """Leave the terminal as it was. May be called again."""
        if self._live is not None:
            self._live.stop()
        for handler, stream in self._diverted:
            handler.setStream(stream)
        self._diverted = []

    def _draw(self) -> None:
        """The bar, and below it what is known."""
        from rich.console import Group
        from rich.text import Text

        # A text of its own goes on in the next line of a narrow terminal.
        values = Text("  ".join(filter(None, [*_formatted(self._shown), self._checkpoint])))
        self._live.update(Group(self._progress, values))

    def _eta(self, step: int) -> str:
        if self._started is None or not self._total or step <= self._started[1]:
            return ""
        seconds = (time.monotonic() - self._started[0]) / (step - self._started[1]) * (self._total - step)
        hours, rest = divmod(int(seconds), 3600)
        return f"eta {hours}:{rest // 60:02d}:{rest % 60:02d}"


def _divert_logs() -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Have loggers that write to the terminal write through the live display, which stands in for stdout and stderr
    since it started: a line of theirs would be drawn over, and leave a stale bar behind. Returns each handler with the
    stream it had."""
    stand_ins = {sys.__stdout__: sys.stdout, sys.__stderr__: sys.stderr}
    diverted = []
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and handler.stream in stand_ins:
            before = handler.setStream(stand_ins[handler.stream])
            if before is not None:
                diverted.append((handler, before))
    return diverted


def _print(text: str) -> None:
    """A line on stdout. Where that is a file on a full disk, the line is kept for later and the run goes on."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _formatted(values: Mapping[str, float]) -> list[str]:
    """Every figure with its label, and beside it what stems and sources have: `loss 0.5 (vision 0.4, text 0.6)`."""
    found = []
    for figure in (*_SHOWN[:1], *scores(values), *_SHOWN[1:]):
        own = by_stem(values, figure) if figure in _OF_STEMS else {}
        beside = ", ".join(f"{stem} {values[name]:.4g}" for stem, name in own.items() if stem)
        if figure in values:
            found.append(_format(figure, values[figure]) + (f" ({beside})" if beside else ""))
        elif beside:
            found.append(f"{_LABELS.get(figure, figure)} {beside}")
    return found


def _format(name: str, value: float) -> str:
    label = _LABELS.get(name, name.replace("test/", "held-out "))
    if figure_name(name).unit == "share" and name != "knn_accuracy":
        return f"{label} {value:.1%}"
    return f"{label} {value:.4g}"
