"""Freed memory is kept for its next use."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from d2v_scale.process import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep_freed()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    several = [np.ones(8 << 20) for _ in range(3)]
    return sum(float(one[-1]) for one in several)
step()
step()
before = faults()
step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_pages_are_not_filled_anew_at_every_step() -> None:
    found = {}
    for way in ("keep", "leave"):
        call = [sys.executable, "-c", SCRIPT, way]
        found[way] = int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    # 3 x 64 MiB are 49,152 pages of 4 KiB, or 96 large ones.
    assert found["leave"] > 50
    assert found["keep"] < 10
