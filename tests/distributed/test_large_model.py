"""A model of a billion parameters is built on four ranks without any of them ever holding it."""

import json
from pathlib import Path

import pytest
from launch import run_ranks

WORKER = Path(__file__).with_name("large_model_worker.py")


@pytest.mark.slow
def test_a_billion_parameters_are_built_a_quarter_on_each_of_four_ranks(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    # The C library would keep freed memory for itself, and the peak would be that of its heap.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run_ranks(4, WORKER, "d2v2_vision_1b", str(out), timeout=1500, env=returned, fresh=True)
    found = json.loads(out.read_text())
    assert found["parameters"] > 1.0e9
    # bf16: what a rank keeps, and the largest layer, which is gathered for a moment.
    quarter, layer = 2 * found["parameters"] / 4, 2 * found["largest_layer"]
    for rank in found["ranks"]:
        assert rank["gathered"] == 0
        assert rank["held"] == pytest.approx(quarter, rel=1e-4)
        assert rank["peak"] - rank["before"] <= quarter + layer, found
