"""What is only seen on a GPU, looked at without one: operations of two devices, waits of the host, kernels, copies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_HERE = Path(__file__).parent

KERNELS = {
    "v1_vision": (130, 134, 182, 27),
    "v1_speech": (186, 156, 180, 27),
    "v1_text": (104, 132, 180, 27),
    "v2_vision": (322, 160, 196, 27),
    "v2_speech": (438, 190, 180, 27),
    "v2_text": (290, 120, 180, 27),
    "v1_text/padded": (136, 164, 184, 27),
    "v2_speech/padded": (500, 250, 184, 27),
    "v2_cubes": (290, 130, 182, 27),
    "v2_maps/padded": (324, 160, 192, 27),
}
"""At most so many kernels of the two micro-batches of a logged step, by model (`/padded`: with shorter rows): of the
student, the teacher, the loss with what is observed, and its statistics."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By model, `/padded` behind those with shorter rows: what `fake_gpu_worker` says."""
    if torch.cuda.is_available() or torch.backends.cuda.is_built():
        pytest.skip("this build of PyTorch has a device guard of its own, for a real GPU")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler (c++) for the device guard")
    folder = tmp_path_factory.mktemp("fake_gpu")
    guard, packages = folder / "guard.so", Path(torch.__file__).parent
    places = [f"-I{packages / 'include'}", f"-L{packages / 'lib'}"]
    source = str(_HERE / "fake_gpu_guard.cpp")
    built = subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", str(guard), *places, "-lc10"],
        capture_output=True,
        text=True,
    )
    if built.returncode:
        pytest.skip(f"the device guard cannot be compiled: {built.stderr.strip().splitlines()[0]}")
    return run(guard, folder / "found.json", "mixed", "waits", *KERNELS)


def run(guard: Path, out: Path, *models: str) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_HERE.parent), str(_HERE)])}
    worker = [sys.executable, str(_HERE / "fake_gpu_worker.py"), str(guard), str(out), *models]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_what_must_be_found_is_found(found: dict[str, dict[str, Any]]) -> None:
    assert "at least two devices" in found["mixed"]["failed"]
    assert "nonzero" in found["waits"]["failed"]


def test_a_logged_step_has_one_device_no_wait_and_no_more_kernels_than_before(
    found: dict[str, dict[str, Any]],
) -> None:
    """Where a change adds kernels on purpose, its number is the new one here."""
    failed = {name: found[name] for name in KERNELS if "failed" in found[name]}
    assert not failed, failed
    kernels = {name: tuple(found[name]["kernels"].values()) for name in KERNELS}
    more = {name: kernels[name] for name, held in KERNELS.items() if any(map(int.__gt__, kernels[name], held))}
    assert not more, f"{more}, held: { ({name: KERNELS[name] for name in more}) }"
    # The masks' counts, which all ranks divide by, are the only thing that the host sends within a step.
    copies = {name: found[name]["copies"] for name in KERNELS}
    assert all(each == {"student": 0, "teacher": 0, "loss": 1, "statistics": 0} for each in copies.values()), copies
