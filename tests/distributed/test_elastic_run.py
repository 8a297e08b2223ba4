"""The training program, stopped and resumed on other processes: 4 at ZeRO-3, 2 that share blocks, 4 in a pipeline."""

import json
from pathlib import Path

import pytest
from launch import ROOT, run_ranks
from paired_shards import paired_samples, write_pairs, write_recipe

from d2v_scale.checkpoint import open_any
from d2v_scale.conversion import demo

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


def losses(run_dir: Path, name: str = "loss") -> dict[int, float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[name] for record in records if name in record}


def same_end(moved: Path, still: Path) -> None:
    """Seven steps, and after them the same place in the data, student and teacher."""
    found, expected = open_any(moved), open_any(still)
    assert found.step == expected.step == 7
    assert found.extra["data"] == expected.extra["data"]
    for kind in ("student", "teacher"):
        for name in expected.names(kind):
            difference = (found.tensor(kind, name) - expected.tensor(kind, name)).abs().max()
            assert float(difference) < 2e-6, (kind, name)


TOGETHER = {
    "recipe": Path(__file__).with_name("joint.yaml"),
    "data__mixing": "together",
    "global_batch_size": 8,
    "optim__eps": "1e-4",
    "tracking__enabled": "false",
    "tracking__plot_every": "null",
    "tracking__log_every": 1,
    "evaluation__max_masked": 8,
    "model__backbone__width": 48,
    "model__backbone__ffn": 96,
    "model__backbone__depth": 3,
    "model__predictor__width": 48,
}


@pytest.mark.slow
def test_a_run_of_all_sources_together_moves_between_topologies(tmp_path: Path) -> None:
    """2, 4 and 1 ranks, with other numbers of micro-batches, as one process alone."""
    demo.ensure(f"demo_data/{modality}/train.index.json" for modality in ("vision", "speech", "text"))
    moved, still = tmp_path / "moved", tmp_path / "still"
    zero3, zero2 = ROOT / "ds_configs" / "zero3.json", ROOT / "ds_configs" / "zero2_offload.json"
    train(2, **TOGETHER, run_dir=moved, stop_at=2, deepspeed_config=zero3, accumulation=6)
    train(4, resume=moved, stop_at=4, deepspeed_config=zero2, accumulation=3)
    train(1, resume=moved, stop_at=7, deepspeed_config=ROOT / "ds_configs" / "zero1.json", accumulation=3)
    train(1, **TOGETHER, run_dir=still, stop_at=7, accumulation=12)
    assert losses(moved) == pytest.approx(losses(still), rel=2e-6)
    for source in ("vision", "speech", "text"):
        name = f"loss/{source}"
        assert losses(moved, name) == pytest.approx(losses(still, name), rel=2e-6)
        assert len(losses(still, name)) == 7
    same_end(moved, still)


@pytest.mark.slow
def test_a_run_on_paired_samples_moves_between_topologies(tmp_path: Path) -> None:
    """2, 1 and 2 ranks, with other numbers of micro-batches, as one process alone. Of three in five samples one part is
    not there, and parts are hidden."""
    recipe = write_recipe(tmp_path / "pairs.yaml", write_pairs(tmp_path / "shards", paired_samples(60)))
    begin = {
        "recipe": recipe,
        "optim__eps": "1e-4",
        "tracking__enabled": "false",
        "tracking__plot_every": "null",
        "evaluation__train": "null",
        "evaluation__test": "null",
    }
    moved, still = tmp_path / "moved", tmp_path / "still"
    for size, stop_at, zero, accumulation in ((2, 2, "zero3", 2), (1, 4, "zero2_offload", 2), (2, 7, "zero1", 1)):
        own = {"resume": moved} if moved.exists() else {**begin, "run_dir": moved}
        zero_file = ROOT / "ds_configs" / f"{zero}.json"
        train(size, **own, stop_at=stop_at, deepspeed_config=zero_file, accumulation=accumulation)
    train(1, **begin, run_dir=still, stop_at=7, accumulation=1)
    for name in ("loss", "loss/pairs/vision", "loss/pairs/speech", "loss/pairs/text"):
        assert losses(moved, name) == pytest.approx(losses(still, name), rel=2e-6), name
        assert len(losses(still, name)) == 7
    same_end(moved, still)


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
    same_end(moved, still)
