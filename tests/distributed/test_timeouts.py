"""Every group of a run gives up after the same time, which is after the watchdog has reported."""

import json
from pathlib import Path

import pytest
from launch import run_ranks

from d2v_scale.process.watchdog import STARTUP_LIMIT_S, collective_timeout_s

WORKER = Path(__file__).with_name("timeout_worker.py")


def test_every_group_of_a_run_has_the_runs_time_limit(tmp_path: Path) -> None:
    """The world's was 5 minutes and the data-parallel group's 30, whatever the watchdog was told."""
    cases = [
        {"name": "dp2, ZeRO-1", "model": "v2_vision", "accumulation": 2},
        {"name": "dp2, ZeRO-3", "model": "v2_vision", "accumulation": 2, "stage": 3},
        {"name": "pp2", "model": "v2_vision", "accumulation": 4, "pipeline": 2},
    ]
    for number, case in enumerate(cases):
        case |= {"steps": [0, 1], "out": str(tmp_path / str(number))}
    listed = tmp_path / "cases.json"
    listed.write_text(json.dumps(cases))
    for output in run_ranks(2, WORKER, str(listed), "47"):
        found = [json.loads(line.removeprefix("LIMITS ")) for line in output.splitlines() if line.startswith("LIMITS ")]
        assert len(found) == len(cases) + 1
        for groups in found:
            assert set(groups.values()) == {47 * 60.0}, groups
        assert len(found[-1]) > len(found[0]) > 3


@pytest.mark.parametrize("limit_s", [1.0, 1800.0, 7200.0])
@pytest.mark.parametrize("phase_s", [0.0, 1800.0, 36000.0])
def test_a_collective_outlasts_the_watchdog_and_its_report(limit_s: float, phase_s: float) -> None:
    settle_s = 15.0
    assert collective_timeout_s(limit_s, phase_s) > max(limit_s, phase_s, STARTUP_LIMIT_S) + 3.5 * settle_s
