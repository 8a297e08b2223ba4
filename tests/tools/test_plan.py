"""plan.py answers from the recipe alone, and refuses what cannot be."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "tools/plan.py"


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True)


def test_estimates_follow_from_flops_and_peak() -> None:
    done = plan("--recipe", "d2v2_vision_huge14", "--nodes", "4", "--gpus", "8", "--device", "h100", "--mfu", "0.5")
    assert done.returncode == 0, done.stderr
    assert "256 positions, 64 kept, 192 masked, 16 masks a sample" in done.stdout
    gflops = float(done.stdout.split("FLOPs of a sample")[1].split()[0])
    seconds = float(done.stdout.split("estimated step")[1].split()[0])
    assert abs(seconds - 256 * gflops * 1e9 / (32 * 989.4e12 * 0.5)) < 1e-3


def test_fewer_samples_than_devices_is_refused() -> None:
    done = plan("--recipe", "d2v2_text_base", "--nodes", "32")
    assert done.returncode == 2
    assert "64 samples of text a step, fewer than 256 devices" in done.stderr
