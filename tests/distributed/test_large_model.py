"""A model of a billion parameters is built on four ranks without any of them ever holding it."""

import json
from pathlib import Path

import pytest
from launch import run_ranks

WORKER = Path(__file__).with_name("large_model_worker.py")


@pytest.mark.slow
def test_a_billion_parameters_are_built_a_quarter_on_each_of_four_ranks(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    run_ranks(4, WORKER, "d2v2_vision_1b", str(out), timeout=1500)
    found = json.loads(out.read_text())
    assert found["parameters"] > 1.0e9
    quarter = 2 * found["parameters"] / 4
    # A layer in fp32, which is what initial values are drawn in.
    layer = 4 * found["largest_layer"]
    for rank in found["ranks"]:
        assert rank["after"] - rank["before"] > 0.9 * quarter
        assert rank["peak"] - rank["before"] <= quarter + layer, found
