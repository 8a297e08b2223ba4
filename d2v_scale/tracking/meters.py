"""How fast a run goes and what it waits for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SpeedMeter:
    """Steps and the share of time spent waiting for data, between two readings.

    Wall-clock only: no device synchronisation but for `paused`. On a device that runs asynchronously a single step's
    time means little, an average over a reading's many steps is right.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.spent: dict[str, float] = {}
        """Seconds of this process so far by what held it up: `data`, `evaluation`, `checkpoint`."""
        self.restart()

    def restart(self) -> None:
        """Begin a reading here."""
        self._since = self._clock()
        self._waits: dict[str, float] = {}
        self.steps = 0
        """Since the reading began."""

    @contextmanager
    def waiting(self, name: str = "data") -> Iterator[None]:
        """Count the time of this block as waiting; `read` reports `<name>_wait_share`."""
        start = self._clock()
        try:
            yield
        finally:
            waited = self._clock() - start
            self._waits[name] = self._waits.get(name, 0.0) + waited
            self.spent[name] = self.spent.get(name, 0.0) + waited

    @contextmanager
    def paused(self, name: str = "evaluation") -> Iterator[None]:
        """Leave the time of this block out of the rates; `spent` has it. Waits for the device before and after."""
        _wait_for_device()
        start = self._clock()
        try:
            yield
        finally:
            _wait_for_device()
            held_up = self._clock() - start
            self._since += held_up
            self.spent[name] = self.spent.get(name, 0.0) + held_up

    def step(self) -> None:
        """One optimizer step is done."""
        self.steps += 1

    def read(self) -> dict[str, float]:
        """`step_seconds` and `<name>_wait_share` since the last reading; starts anew."""
        elapsed = max(self._clock() - self._since, 1e-9)
        values = {"step_seconds": elapsed / self.steps} if self.steps else {}
        values |= {f"{name}_wait_share": min(1.0, wait / elapsed) for name, wait in self._waits.items()}
        self.restart()
        return values


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Times one block without a host synchronisation; the device's time where there is one."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def _mark(self) -> None:
        import torch

        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def start(self) -> None:
        """Begin; an earlier time is forgotten."""
        self._marks = []
        self._mark()

    def stop(self) -> None:
        """End."""
        self._mark()

    def __enter__(self) -> "Stopwatch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def seconds(self) -> float:
        """How long the block took; 0 if it never ran. Waits for the device."""
        if len(self._marks) < 2:
            return 0.0
        begin, end = self._marks
        if isinstance(begin, float):
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def host_values() -> dict[str, float]:
    """Memory (GiB) of this process and host, processor use, and this process's device memory where there is one."""
    import psutil  # type: ignore[import-untyped]
    import torch

    gib = 1024**3
    values = {
        "host_memory_gib": psutil.Process().memory_info().rss / gib,
        "host_memory_used_share": psutil.virtual_memory().percent / 100,
        "host_cpu_share": psutil.cpu_percent(interval=None) / 100,
    }
    if torch.cuda.is_available():
        values["device_memory_gib"] = torch.cuda.memory_allocated() / gib
        values["device_memory_peak_gib"] = torch.cuda.max_memory_allocated() / gib
        values["device_memory_reserved_gib"] = torch.cuda.memory_reserved() / gib
    return values
