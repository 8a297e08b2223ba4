import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from d2v_scale.errors import ConfigError
from d2v_scale.process.config import ProfileConfig
from d2v_scale.process.profiling import StepProfiler, describe, part


def run_steps(profiler: StepProfiler, count: int, student: nn.Module, teacher: nn.Module) -> list[Path]:
    tables = []
    x = torch.randn(64, 64)
    for step in range(1, count + 1):
        profiler.begin(step)
        with part("student"):
            loss = student(x).sum()
        with part("teacher"), torch.no_grad():
            for _ in range(200):
                teacher(x)
        loss.backward()
        table = profiler.end(step)
        if table is not None:
            tables.append(table)
    return tables


def test_a_range_of_steps_gives_a_trace_and_a_table(tmp_path: Path) -> None:
    student, teacher = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), nn.Linear(64, 64)
    profiler = StepProfiler(ProfileConfig(steps="3:4"), tmp_path, {"decoder": student[1]})
    (table,) = run_steps(profiler, 6, student, teacher)
    text = table.read_text()
    assert text.startswith("2 steps, ")
    shares = {line[:36].strip(): float(line[47:].split("%")[0]) for line in text.splitlines()[3:] if "%" in line}
    assert shares["teacher"] > shares["student"]
    assert {"decoder", "not named", "communication (inside the parts)"} <= shares.keys()
    assert sum(shares[name] for name in ("student", "teacher", "decoder", "not named")) == pytest.approx(100, abs=0.3)
    assert "aten::addmm" in text
    trace = json.loads(gzip.decompress((tmp_path / "logs" / "profile-3-4.json.gz").read_bytes()))
    assert sum(event.get("name") == "d2v_scale::decoder" for event in trace["traceEvents"]) == 2
    assert not student[1]._forward_hooks


def test_a_request_profiles_the_next_steps(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(), tmp_path)
    student = nn.Linear(64, 64)
    assert run_steps(profiler, 2, student, student) == []
    profiler.request(next_step=1, count=2)
    assert [path.name for path in run_steps(profiler, 4, student, student)] == ["profile-1-2.txt"]


def of_a_device() -> EventList:
    """What one step leaves on a device: 600 us of a product in the student, 300 us of communication in the teacher."""

    def event(name: str, start: int, end: int, **more: Any) -> FunctionEvent:
        found = FunctionEvent(len(events), name, more.pop("thread", 1), start, end, use_device="cuda", stack=[], **more)
        events.append(found)
        return found

    events: list[FunctionEvent] = []
    event("d2v_scale::steps", 0, 2000, is_user_annotation=True)
    parts = [("student", 100, "aten::mm", "gemm", 600), ("teacher", 800, "c10d::allreduce_", "ncclDevKernel_Sum", 300)]
    for name, start, operation, kernel, duration in parts:
        event(f"d2v_scale::{name}", start, start + 200, is_user_annotation=True)
        event(operation, start + 10, start + 50).append_kernel(kernel, 0, duration)
        on_device = {"device_type": DeviceType.CUDA, "thread": 7}
        event(kernel, start + 100, start + 100 + duration, **on_device)
        # Kineto's copy of the part, from its first to its last kernel.
        event(f"d2v_scale::{name}", start + 100, start + 100 + duration, is_user_annotation=True, **on_device)
    event("d2v_scale::steps", 200, 1200, is_user_annotation=True, **on_device)
    listed = EventList(sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)), use_device="cuda")
    listed._build_tree()
    return listed


def test_kernels_operations_and_copies_of_parts_are_not_added_up() -> None:
    events = of_a_device()
    profile = SimpleNamespace(events=lambda: events, key_averages=events.key_averages)
    text = describe(profile, steps=1)
    rows = {line[:36].strip(): (float(line[37:46]), line[47:54].strip()) for line in text.splitlines() if "%" in line}
    assert text.startswith("1 steps, 2.00 ms each")
    assert rows["student"] == (0.6, "66.7%")
    assert rows["teacher"] == (0.3, "33.3%")
    assert rows["not named (backward, where it has i…"] == (0.0, "0.0%")
    assert rows["communication (inside the parts)"] == (0.3, "33.3%")
    assert rows["aten::mm"] == (0.6, "66.7%")
    assert not {"gemm", "ncclDevKernel_Sum"} & rows.keys()


@pytest.mark.parametrize("steps", ["20", "5:3", "a:b", "0:2", "1:2:3", "-1:2"])
def test_a_wrong_range_is_named(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"profile\.steps"):
        ProfileConfig(steps=steps).bounds()


def test_a_profile_of_the_host_writes_nothing_on_stderr() -> None:
    program = "from d2v_scale.process.profiling import profiler\nwith profiler(): pass"
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "profiler_start" not in done.stderr


def test_sigusr2_asks_for_a_profile(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    try:
        profiler = StepProfiler(ProfileConfig(), tmp_path, rank=1)
        signal.raise_signal(signal.SIGUSR2)
        student = nn.Linear(64, 64)
        assert [path.name for path in run_steps(profiler, 6, student, student)] == ["profile-1-5-rank-00001.txt"]
    finally:
        signal.signal(signal.SIGUSR2, before)
