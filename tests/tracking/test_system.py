import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mlflow import MlflowClient
from mlflow_server import MlflowServer

from d2v_scale.tracking import RunTracker, TrackingConfig
from d2v_scale.tracking.follow import catch_up
from d2v_scale.tracking.record import parse_lines
from d2v_scale.tracking.system import SystemMonitor, system_files


def sampled(run_dir: Path, node: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", node)
    monitor = SystemMonitor(run_dir, every=0.05)
    monitor.start()
    path = run_dir / "logs" / f"system-{node}.jsonl"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    deadline = time.monotonic() + 30
    while not path.exists() or len(path.read_text().splitlines()) < before + samples:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    monitor.stop()


def test_every_node_is_sampled_and_goes_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node in ("node-a", "node-b", "node-a"):
        sampled(tmp_path, node, 3, monkeypatch)
    assert [path.name for path in system_files(tmp_path)] == ["system-node-a.jsonl", "system-node-b.jsonl"]
    records = [json.loads(line) for line in system_files(tmp_path)[0].read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= 6
    assert 0 < records[-1]["system_memory_usage_percentage"] <= 100
    assert records[1]["network_receive_megabytes_per_second"] >= 0


def test_a_device_that_refuses_costs_its_reading_alone_and_no_device_is_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NVMLError(Exception):
        pass

    def entered(index: int) -> tuple[int, int]:
        raise AssertionError(f"takes memory on device {index}")

    def power(index: int) -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", entered)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: (index + 1) * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(torch.cuda, "utilization", lambda index: 97)
    monkeypatch.setattr(torch.cuda, "power_draw", power)
    values = SystemMonitor(tmp_path).sample()
    assert values["system_memory_usage_percentage"] > 0
    assert {name: value for name, value in values.items() if name.startswith("gpu")} == {
        "gpu_0_memory_usage_megabytes": 1024,
        "gpu_0_memory_usage_percentage": 12.5,
        "gpu_0_utilization_percentage": 97,
        "gpu_1_memory_usage_megabytes": 2048,
        "gpu_1_memory_usage_percentage": 25,
        "gpu_1_utilization_percentage": 97,
    }


def test_mlflow_gets_system_metrics_by_node(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    tracker = RunTracker(tmp_path, TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    tracker.log(1, 1, {"loss": 1.0})
    for node in ("node-a", "node-b"):
        sampled(tmp_path, node, 2, monkeypatch)
    for _ in range(2):
        mirror = catch_up(tmp_path)
        assert mirror is not None
        assert mirror.pending() == 0
    client = MlflowClient(mlflow_server.uri)
    for path in system_files(tmp_path):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        name = f"system/{path.stem.removeprefix('system-')}/cpu_utilization_percentage"
        points = client.get_metric_history(mirror.state.run_id, name)
        assert [(p.step, p.value) for p in points] == [(r["step"], r["cpu_utilization_percentage"]) for r in records]


def test_a_torn_last_sample_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "logs" / "system-node-a.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "time": 1.0}\n{"step": 2, "ti')
    sampled(tmp_path, "node-a", 2, monkeypatch)
    steps = [record["step"] for _, _, record in parse_lines(path.read_bytes())]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 3
