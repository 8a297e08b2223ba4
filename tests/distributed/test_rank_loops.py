"""What replaces DeepSpeed's loops over ranks gives its bits, and the host's work of a step does not grow."""

from pathlib import Path

import launch

HERE = Path(__file__).parent


def test_without_loops_over_ranks_every_bit_is_the_same() -> None:
    for output in launch.run_ranks(3, HERE / "rank_loops_worker.py"):
        assert "bitwise equal" in output
