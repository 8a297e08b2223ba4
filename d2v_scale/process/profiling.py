"""Where the time of a step goes: a trace of chosen steps, and a table of the costliest operations and parts."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType

from d2v_scale.process.config import ProfileConfig

_PREFIX = "d2v_scale::"
_COMMUNICATION = ("nccl:", "gloo:", "c10d::")
_COMMUNICATION_KERNELS = "nccl"


_clock: dict[str, float] | None = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """Name what runs in this block (student, teacher, ema, data, ...) for the profile; next to free without."""
    with torch.profiler.record_function(_PREFIX + name):
        if _clock is None:
            yield
            return
        begin = time.perf_counter()
        yield
        _wait()
        _clock[name] = _clock.get(name, 0.0) + time.perf_counter() - begin


@contextmanager
def seconds_of_parts() -> Iterator[dict[str, float]]:
    """Wall seconds of every `part` that runs inside, filled in as they end. Waits for the device after each of them."""
    global _clock
    assert _clock is None, "parts are being timed already"
    _wait()
    _clock = {}
    try:
        yield _clock
    finally:
        _clock = None


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profiler() -> torch.profiler.profile:
    """PyTorch's profiler of the host, and of the device where there is one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    else:
        # Else it writes a line on stderr for every start and end. What it says beside that is about devices.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return torch.profiler.profile(activities=activities)


def decoders(student: nn.Module) -> dict[str, nn.Module]:
    """The student's predictors, under the names that a profile shows."""
    found = dict(getattr(student, "predictors", {}).items())
    return {"decoder" if len(found) == 1 else f"decoder {name}": module for name, module in found.items()}


class StepProfiler:
    """Profiles a range of steps of one process. The loop calls `begin` before and `end` after every step.

    Writes logs/profile-<first>-<last>.json.gz (for Perfetto or chrome://tracing) and .txt, the table. Not collective:
    one rank may profile alone.
    """

    def __init__(
        self, config: ProfileConfig, run_dir: Path, modules: dict[str, nn.Module] | None = None, *, rank: int = 0
    ) -> None:
        """SIGUSR2 to this process asks for a profile of its next five steps, from now on.

        `modules`: parts that are modules, by name (the decoder); their forward passes are named while profiling.
        `rank`: others than 0 have it in their files' names.
        """
        self._bounds = config.bounds()
        self._run_dir = run_dir
        self._modules = modules or {}
        self._profile: Any = None
        self._handles: list[Any] = []
        self._suffix = f"-rank-{rank:05d}" if rank else ""
        self._asked = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR2, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def request(self, next_step: int, count: int = 5) -> None:
        """Profile the next `count` steps, as asked for by a signal; ignored while a profile is being taken."""
        if self._profile is None:
            self._bounds = (next_step, next_step + count - 1)

    def begin(self, step: int) -> None:
        """Before step number `step` (from 1)."""
        if self._asked:
            self._asked = False
            self.request(step)
        if self._bounds is None or step != self._bounds[0] or self._profile is not None:
            return
        for name, module in self._modules.items():
            self._handles += _named(name, module)
        self._profile = profiler()
        self._profile.__enter__()
        self._whole = torch.profiler.record_function(_PREFIX + "steps")
        self._whole.__enter__()

    def end(self, step: int) -> Path | None:
        """After step number `step`; the table's path once the last profiled step is over."""
        if self._profile is None or self._bounds is None or step < self._bounds[1]:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._whole.__exit__(None, None, None)
        self._profile.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        name = f"profile-{self._bounds[0]}-{self._bounds[1]}{self._suffix}"
        folder = self._run_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(folder / f"{name}.json.gz"))
        table = folder / f"{name}.txt"
        table.write_text(describe(self._profile, steps=self._bounds[1] - self._bounds[0] + 1))
        self._profile, self._bounds, self._handles = None, None, []
        return table


def describe(profile: Any, steps: int) -> str:
    """The table: share of every named part, share of communication, and the ten costliest operations.

    On a device the profile has everything up to three times: kernels, the operations that launched them (with their
    kernels' time as "device time"), and a copy of every named part on each stream. Parts and operations are read from
    what ran on the host, the total and the communication from the kernels.
    """
    events = profile.events()
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    on_device = bool(kernels)
    parts = exclusive_parts([event for event in on_host if event.name.startswith(_PREFIX)], on_device)
    wall = next(event.time_range.elapsed_us() for event in on_host if event.name == _PREFIX + "steps")
    # On a device the named parts share its busy time; kernels launched by the backward threads belong to none of them.
    total = sum(event.time_range.elapsed_us() for event in kernels) if on_device else wall
    parts["not named (backward, where it has its own threads)" if on_device else "not named"] = total - sum(
        parts.values()
    )
    lines = [
        f"{steps} steps, {wall / steps / 1e3:.2f} ms each",
        "",
        "part (exclusive)                      ms/step   share",
    ]
    lines += [_row(name, time, total, steps) for name, time in sorted(parts.items(), key=lambda item: -item[1])]
    communication = sum(
        event.time_range.elapsed_us()
        for event in (kernels if on_device else on_host)
        if event.name.startswith(_COMMUNICATION_KERNELS if on_device else _COMMUNICATION)
    )
    lines += [_row("communication (inside the parts)", communication, total, steps)]
    lines += ["", "ten costliest operations (self time)   ms/step   share     calls"]
    averages = [
        average
        for average in profile.key_averages()
        if average.device_type == DeviceType.CPU and not average.key.startswith((_PREFIX, "ProfilerStep"))
    ]
    own = (lambda a: a.self_device_time_total) if on_device else (lambda a: a.self_cpu_time_total)
    for average in sorted(averages, key=own, reverse=True)[:10]:
        lines.append(f"{_row(average.key, own(average), total, steps)} {average.count:9d}")
    return "\n".join(lines) + "\n"


def exclusive_parts(events: Iterable[Any], on_device: bool) -> dict[str, float]:
    """Microseconds of every named part without the parts inside it, except the outermost, `steps`.

    `events`: of the host. `on_device`: count the kernels that they launched instead of their own time.
    """
    exclusive: dict[str, float] = {}
    open_parts: dict[int, list[Any]] = {}
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        name = event.name.removeprefix(_PREFIX)
        if name == "steps":
            continue
        stack = open_parts.setdefault(event.thread, [])
        while stack and stack[-1].time_range.end <= event.time_range.start:
            stack.pop()
        cost = event.device_time_total if on_device else event.time_range.elapsed_us()
        exclusive[name] = exclusive.get(name, 0.0) + cost
        if stack:
            exclusive[stack[-1].name.removeprefix(_PREFIX)] -= cost
        stack.append(event)
    return exclusive


def _row(name: str, microseconds: float, total: float, steps: int) -> str:
    shown = name if len(name) <= 36 else name[:35] + "…"
    return f"{shown:36s} {microseconds / steps / 1e3:9.3f} {microseconds / max(total, 1e-9):7.1%}"


def _named(name: str, module: nn.Module) -> list[Any]:
    """Hooks that wrap the module's forward pass in `part(name)`."""
    running: list[Any] = []

    def enter(*_: Any) -> None:
        running.append(torch.profiler.record_function(_PREFIX + name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
