"""The training program, stopped and resumed on other processes: 4 at ZeRO-3, 2 that share blocks, 4 in a pipeline."""

import json
from pathlib import Path

import pytest
from launch import ROOT, run_ranks

from d2v_scale.checkpoint import open_any

TRAIN = ROOT / "d2v_scale" / "train.py"
RECIPE = {
    "--recipe": "demo_vision",
    "--global_batch_size": "12",
    "--data.workers": "0",
    "--optim.eps": "1e-4",
    "--tracking.enabled": "false",
    "--tracking.plot_every": "null",
    "--tracking.log_every": "1",
    "--evaluation.train": "null",
    "--evaluation.test": "null",
}


def train(world_size: int, **keys: object) -> None:
    options = [text for name, value in keys.items() for text in (f"--{name.replace('__', '.')}", str(value))]
    run_ranks(world_size, TRAIN, *options)


def losses(run_dir: Path) -> dict[int, float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_a_run_moves_between_topologies(tmp_path: Path) -> None:
    recipe = {name.removeprefix("--").replace(".", "__"): value for name, value in RECIPE.items()}
    moved, still = tmp_path / "moved", tmp_path / "still"
    zero3, zero1 = ROOT / "ds_configs" / "zero3.json", ROOT / "ds_configs" / "zero1.json"
    train(4, **recipe, run_dir=moved, stop_at=2, deepspeed_config=zero3, teacher__placement="cpu")
    train(2, resume=moved, stop_at=4, deepspeed_config=zero1, parallel__tensor=2)
    pipeline = ROOT / "ds_configs" / "pipeline.json"
    divided = {"parallel__tensor": 2, "parallel__pipeline": 2, "accumulation": 2}
    train(4, resume=moved, stop_at=7, deepspeed_config=pipeline, **divided)
    train(1, **recipe, run_dir=still, stop_at=7)
    assert losses(moved) == pytest.approx(losses(still), rel=2e-6)
    found, expected = open_any(moved), open_any(still)
    assert found.step == expected.step == 7
    assert found.extra["data"] == expected.extra["data"]
    for kind in ("student", "teacher"):
        for name in expected.names(kind):
            difference = (found.tensor(kind, name) - expected.tensor(kind, name)).abs().max()
            assert float(difference) < 2e-6, (kind, name)
