"""What a run shows of itself: every health figure in the record, pictures while it goes on, totals over a restart."""

import json
from pathlib import Path

import pytest
from launch import ROOT, run_ranks

from d2v_scale.conversion import demo

FIGURES = [
    "loss",
    "loss/masked_50_75",
    "masked_share",
    "lr",
    "lr/vision",
    "grad_norm",
    "grad_norm/stem",
    "grad_norm/blocks_first",
    "grad_norm/predictor",
    "update_ratio/blocks_last",
    "target_rank",
    "target_std",
    "target_cosine",
    "prediction_rank",
    "prediction_std",
    "prediction_cosine",
    "stem_std",
    "student_teacher_distance",
    "teacher_update_norm",
    "decay",
    "data_wait_share",
    "data/padding",
    "data/delivered",
    "data/lost",
    "data/planned",
    "data/vision/epoch",
    "mfu",
    "mfu_student",
    "tflops_per_device",
    "samples_per_second",
    "host_memory_gib",
    "ema_seconds",
    "step_seconds",
    "hours",
    "samples",
]
EVALUATED = [
    "knn_accuracy",
    "knn_chance",
    "knn_raw",
    "layer_likeness",
    "held_out_loss",
    "held_out_explained",
    "rankme",
    "lidar",
    "attention_entropy",
    "attention_entropy/layer_04",
    "cka",
    "cka/layer_01",
]
"""Before the first step and after the last."""


def train(run_dir: Path, shards: Path, steps: int) -> list[dict]:
    settings = {
        "--recipe": "demo_vision",
        "--run_dir": run_dir,
        "--data": shards / "train.index.json",
        "--evaluation.train": shards / "test.index.json",
        "--evaluation.test": shards / "test.index.json",
        "--deepspeed_config": ROOT / "ds_configs" / "zero3.json",
        "--optim.lr_scale": "{vision: 0.5}",
        "--stop_at": steps,
        "--checkpoint.every": 100,
        "--tracking.enabled": "false",
        "--tracking.log_every": 2,
        "--tracking.plot_every": 3,
        "--tracking.peak_tflops": 0.05,
    }
    run_ranks(2, ROOT / "d2v_scale" / "train.py", *[str(text) for pair in settings.items() for text in pair])
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_shows_its_health_and_goes_on_counting_after_a_restart(tmp_path: Path) -> None:
    shards = demo.write("vision", tmp_path / "demo_data")
    run_dir = tmp_path / "run"
    records = train(run_dir, shards, 4)
    assert [record["step"] for record in records if EVALUATED[0] in record] == [0, 4]
    for name in EVALUATED:
        assert [record["step"] for record in records if name in record] == [0, 4], name
    first = [record for record in records if "loss" in record]
    assert [name for name in FIGURES if name not in first[-1]] == []
    assert 0 < first[-1]["mfu_student"] < first[-1]["mfu"] < 1
    assert first[-1]["data/delivered"] == 4 * 64

    pictures = {"health.png", "first_batch.png", "masks.png", "neighbours.png", "pca.png", "layers_teacher_teacher.png"}
    assert {path.name for path in (run_dir / "plots").iterdir()} == pictures
    events = [json.loads(line) for line in (run_dir / "mlflow_events.jsonl").read_text().splitlines()]
    sent = {Path(event["path"]).name for event in events if event["event"] == "artifact"}
    assert pictures <= sent

    second = [record for record in train(run_dir, shards, 30) if "loss" in record]
    assert second[-1]["data/delivered"] == second[-1]["data/planned"] == second[-1]["samples"] == 30 * 64
    (epoch,) = [record for record in second if "data/vision/epoch_planned" in record]
    assert epoch["data/vision/epoch_delivered"] == epoch["data/vision/epoch_planned"] > 1000
