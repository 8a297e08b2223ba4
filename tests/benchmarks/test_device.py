"""The table of whole steps on a GPU: its rehearsal on whatever device there is, and what its rows say."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d2v_scale.benchmarks import device

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_one_command_fills_the_whole_table(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "tools/bench_gpu.sh"), "--dry_run", "--minutes", "20"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(row["model"], row["variant"]) for row in found["rows"]] == [
        (spec.model, spec.variant) for spec in device.specs(tmp_path, dry_run=True)
    ]
    for row in found["rows"]:
        # bf16 on both sides, the same weights and masks: losses agree.
        assert not row.get("note"), row
        assert row["step_seconds"] > 0
        assert row["against_hf"] > 0
        if row["variant"] == "ours":
            assert 0 <= row["data_wait_share"] <= 1
            assert 0 < row["ema_share"] < 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("table.md", "results.json", "operations.txt"),
        *(f"trace-{model.name.lower().replace(' ', '-')}.json.gz" for model in device.MODELS),
    }
    assert "ten costliest operations" in (tmp_path / "operations.txt").read_text()
    assert (tmp_path / "table.md").read_text() in done.stdout


def test_full_size_rows_are_of_published_recipes_the_main_ones_first(tmp_path: Path) -> None:
    found = device.specs(tmp_path, dry_run=False)
    assert len(found) == len(device.MODELS) * len(device.VARIANTS)
    assert [spec.variant for spec in found[:8]] == ["ours"] * 4 + ["hf"] * 4
    assert {spec.recipe for spec in found} == {f"d2v{v}_{m}_large" for v in (1, 2) for m in ("vision", "speech")}
    assert all(spec.peer is (spec.variant == "hf") for spec in found)


def test_a_row_that_breaks_is_named_with_its_reason(tmp_path: Path) -> None:
    spec = replace(device.specs(tmp_path, dry_run=True)[0], recipe="no_such_recipe", details=None)
    row = device.Process(spec, tmp_path, 0).finish(time.monotonic() + 300)
    assert "step_seconds" not in row
    assert row["note"].startswith("not measured: ")
    assert "no_such_recipe" in row["note"]


def test_a_row_without_time_is_named_and_its_process_ended(tmp_path: Path) -> None:
    process = device.Process(device.specs(tmp_path, dry_run=True)[1], tmp_path, 0)
    assert process.finish(time.monotonic()) == {"note": "not measured: no time left"}
    assert process._process.returncode is not None


def row(variant: str, step: float, **more: Any) -> dict[str, Any]:
    base = {"model": "m", "variant": variant, "samples": 4, "loss": 1.0, "grad_norm": 2.0, "ema_share": 0.1}
    return {**base, "step_seconds": step, "samples_per_second": 4 / step, **more}


def test_rows_are_compared_with_the_peer_and_with_each_other() -> None:
    rows = [
        row("ours", 1.0),
        row("hf", 2.0, grad_norm=None),
        row("compile", 0.5, grad_norm=0.0),
        row("teacher on cpu", 1.2),
        {"model": "m", "variant": "recomputed", "note": "not measured: over 100 s"},
    ]
    device.complete(rows)
    assert [one.get("against_hf") for one in rows] == [2.0, 1.0, 4.0, pytest.approx(1 / 0.6), None]
    # The step without any EMA takes 0.9; in host memory it takes 1.2.
    assert rows[3]["ema_share"] == pytest.approx(0.25)
    assert rows[2]["note"] == "gradient norm 0 against 2"
    text = device.table(rows, {"device": "d", "date": "1", "command": "c", **dict.fromkeys(device.VERSIONS, "1")})
    assert "| m | ours | 4 | 1000.0 | 4.0 | 2.00 |" in text
    assert text.endswith("- m, recomputed: not measured: over 100 s\n")


def test_losses_that_disagree_are_named() -> None:
    rows = [row("ours", 1.0), row("hf", 2.0, loss=1.2)]
    device.complete(rows)
    assert "loss 1" in rows[0]["note"]
