"""Compiled blocks compute what eager ones do, at ZeRO-1 and ZeRO-3, with activation checkpointing and without."""

import json
import shutil
from pathlib import Path

import pytest
from launch import run_ranks

WORKER = Path(__file__).with_name("compiled_worker.py")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_gradients_are_the_eager_ones(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    run_ranks(2, WORKER, str(out), timeout=1500, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")})
    rows = json.loads(out.read_text())
    assert len(rows) == 10
    for row in rows:
        assert row["gradient"] < 2e-5, row
        assert row["loss"] < 2e-6, row
        _, compiled, _ = row["case"]
        assert (row["compiled"] > 0) is compiled, row
        # One graph a block: nothing of ZeRO-3 is inside.
        assert row["breaks"] == 0, row
