"""The table of whole steps on a GPU: its rehearsal on whatever device there is, and what its rows say."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_scale.benchmarks import device, device_gradients, device_rows

ROOT = Path(__file__).parents[2]
(STEPS,) = device_rows.specs(Path(), dry_run=True, only="hf-vision2")


@pytest.mark.slow
def test_one_command_fills_the_whole_table(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "tools/bench_gpu.sh"), "--dry_run", "--minutes", "20"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(row["model"], row["variant"]) for row in found["rows"]] == [
        (spec.model, spec.variant) for spec in device_rows.specs(tmp_path, dry_run=True)
    ]
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        by_variant.setdefault(row["variant"], []).append(row)
    (gradients,) = by_variant.pop("gradients")
    assert gradients["gradients"]["failed"] == []
    assert len(gradients["gradients"]["calls"]) == len(device_gradients.KINDS) * len(device_gradients.LENGTHS)
    for row in by_variant.pop("streams"):
        assert 0 < row["teacher_share"] < 1
        assert row["beside"] > 0
    for row in (one for rows in by_variant.values() for one in rows):
        # bf16 on both sides, the same weights and masks: losses agree.
        assert not row.get("note"), row
        assert row["step_seconds"] > 0
        assert (row.get("against_hf", 0) > 0) != (row["variant"] in device.OTHER_BATCHES)
        if row["variant"] == "ours":
            assert 0 <= row["data_wait_share"] <= 1
            assert 0 < row["ema_share"] < 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("table.md", "results.json", "operations.txt"),
        *(f"trace-{model.name.lower().replace(' ', '-')}.json.gz" for model in device_rows.MODELS.values()),
    }
    assert "ten costliest operations" in (tmp_path / "operations.txt").read_text()
    assert (tmp_path / "table.md").read_text() in done.stdout


def test_a_row_that_breaks_is_named_with_its_reason(tmp_path: Path) -> None:
    spec = replace(STEPS, recipe="no_such_recipe", details=None)
    row = device.Process(spec, tmp_path, 0).finish(time.monotonic() + 300)
    assert "step_seconds" not in row
    assert row["note"].startswith("not measured: ")
    assert "no_such_recipe" in row["note"]


def test_a_row_without_time_is_named_and_its_process_ended(tmp_path: Path) -> None:
    process = device.Process(STEPS, tmp_path, 0)
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


def test_gradients_and_streams_have_no_line_in_the_table_of_steps_and_a_wrong_gradient_is_named() -> None:
    call = {"kind": "padding", "length": 192, "chosen": 0.5, "cudnn": None, "flash": None, "efficient": 0.004}
    found = {"calls": [call], "failed": ["padding at 192"]}
    rows: list[dict[str, Any]] = [
        row("ours", 1.0),
        {"model": "m", "variant": "streams", "beside": 0.9, "teacher_share": 0.25, "note": ""},
        {"model": "attention", "variant": "gradients", "gradients": found, "note": "padding at 192: not right"},
        {"model": "m", "variant": "streams", "note": "not measured: no time left"},
    ]
    device.complete(rows)
    text = device.table(rows, {"device": "d", "date": "1", "command": "c", **dict.fromkeys(device.VERSIONS, "1")})
    assert "beside the student's takes 0.90 of both in turn, of which it is 25 %" in text
    assert "| padding | 192 | 0.5 | refused | refused | 0.004 |" in text
    assert "- attention, gradients: padding at 192: not right" in text
    assert sum(line.startswith("| m | streams") for line in text.splitlines()) == 1


def test_batches_of_other_lengths_are_not_compared_with_the_peer() -> None:
    rows = [row("ours", 1.0), row("hf", 2.0), row("padded", 1.0, loss=9.0, grad_norm=9.0), row("varying lengths", 1.0)]
    device.complete(rows)
    assert all("against_hf" not in one and "note" not in one for one in rows[2:])


@pytest.mark.parametrize("kind", ["varying", "padded"])
def test_varying_batches_have_as_many_seconds_each_and_padded_ones_shorter_rows(kind: Any) -> None:
    from d2v_scale.benchmarks import cases, device_case

    (spec,) = device_rows.specs(Path(), dry_run=True, only="padded-speech1")
    case = cases.case(spec.recipe, 12, 8000, spec.options)
    batches = device_case.batches_of(case, replace(spec, lengths=kind))
    if kind == "varying":
        lengths = [batch.inputs.shape[1] for batch in batches]
        assert len(set(lengths)) == len(lengths) >= 5
        assert max(lengths) > 5 * min(lengths)
        for batch in batches:
            assert 0.75 < batch.inputs.numel() / (12 * 8000) < 1.25
        return
    for batch in batches:
        assert batch.valid is not None
        counts_b = batch.valid.sum(1)
        assert int(counts_b[0]) == 4800
        assert int(counts_b[-1]) == 8000
        assert not batch.inputs[~batch.valid].any()
        # No padded frame is masked.
        frames = torch.tensor([4800, 8000])
        stem = case.recipe.model.speech
        assert stem is not None
        assert not batch.masked_rt[0, int(stem.frames_of(frames)[0]) :].any()
