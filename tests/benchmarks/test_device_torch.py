"""The PyTorch found on a GPU machine is judged before anything else."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_scale.benchmarks import device_torch

ROOT = Path(__file__).parents[2]


class OneGpu:
    """`torch.cuda` of a machine with a GPU on which every tensor is a CPU's."""

    def is_available(self) -> bool:
        return True

    def get_device_name(self) -> str:
        return "NVIDIA H100"

    def get_device_capability(self) -> tuple[int, int]:
        return 9, 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.ones
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "cuda", OneGpu())
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: real(*shape, **options))


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("2.13.0+cu130", True), ("2.11.1", True), ("2.10.0", False), ("2.14.0a0+git1", False), ("2.14.0", False)],
)
def test_versions_are_those_of_pyproject(version: str, wanted: bool) -> None:
    assert device_torch.is_wanted(version) is wanted


def test_another_version_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    assert device_torch.main(["--any_device"]) == 2
    assert capsys.readouterr().err == f"error: PyTorch is 2.8.0+cu128: install {device_torch.wanted()} with CUDA.\n"


def test_a_build_without_cuda_a_machine_without_a_gpu_and_a_missing_torch_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in (device_torch.problem(any_device=False) or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no GPU" in (device_torch.problem(any_device=False) or "")
    assert device_torch.problem(any_device=True) is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "PyTorch cannot be imported" in (device_torch.problem(any_device=True) or "")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_must_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_torch.problem(any_device=False) is None
    assert device_torch.found(torch).endswith("NVIDIA H100 (sm_90)")
    plain = torch.ones

    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch, "ones", refused)
    assert "cannot multiply in bf16" in (device_torch.problem(any_device=False) or "")
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: plain(*shape, **options) * 2)
    assert "multiplies wrongly" in (device_torch.problem(any_device=False) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_asks_before_it_makes_or_installs_anything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "tools/bench_gpu.sh"), "--out", str(out), "--wheels", str(tmp_path / "none")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: PyTorch ")
    assert not out.exists()
    named = subprocess.run([*command, "--only", "nosuch"], env=environment, capture_output=True, text=True, timeout=120)
    assert named.returncode == 2
    assert "'nosuch' is no row" in named.stderr
