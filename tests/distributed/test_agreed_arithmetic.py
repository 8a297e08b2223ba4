"""All ranks compute in the same, whatever each of them would have measured."""

import json
from pathlib import Path

from launch import run_ranks

from d2v_scale.process import started

WORKER = Path(__file__).with_name("arithmetic_worker.py")


def test_ranks_that_measure_the_opposite_agree(tmp_path: Path) -> None:
    for output in run_ranks(2, WORKER, str(tmp_path), env={started.MEASURE: "1"}):
        lines = [line.removeprefix("FOUND ") for line in output.splitlines() if line.startswith("FOUND ")]
        # Rank 0 decides, but for bf16 that one of the processors has not.
        assert [json.loads(line) for line in lines] == [[True, []], [False, ["small both"]]]
