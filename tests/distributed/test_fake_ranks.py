"""What one rank of a large world does in a step, counted over a fake process group."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import launch
import pytest

WORKER = Path(__file__).with_name("fake_ranks_worker.py")


@cache
def _counted(case: str) -> dict[str, Any]:
    out = Path(launch._logs().name)
    asked, answer = (out / f"{abs(hash(case))}.{suffix}" for suffix in ("case", "counts"))
    asked.write_text(case)
    code, printed = launch.run_program(WORKER, str(asked), str(answer))
    assert code == 0, printed[-4000:]
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def counted(world_size: int, depth: int, **zero: Any) -> dict[str, Any]:
    return _counted(json.dumps({"world_size": world_size, "depth": depth, "zero": zero}))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_hosts_work_of_a_step_does_not_grow_with_the_world(stage: int) -> None:
    """A step of ZeRO-3 made 4.1 times, of ZeRO-1 3.5 times the Python calls at 1,024 ranks that it makes at 8."""
    few, many = (counted(world_size, 4, stage=stage) for world_size in (8, 1024))
    assert many["python_calls"]["step"] <= 1.05 * few["python_calls"]["step"]
    assert many["python_calls"]["pieces"] <= 1.05 * few["python_calls"]["pieces"]
    assert many["collectives"] == few["collectives"]
    # Each rank is in as many groups as before, though it hears of those that others are in.
    assert many["groups"]["own"] == few["groups"]["own"]
    assert many["groups"]["calls"] <= 12 * 1024
