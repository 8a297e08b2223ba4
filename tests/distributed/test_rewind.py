"""Spikes in the real training program: a run that goes back ends as one that was planned without what it left out.

The rule is so tight that a healthy run has some spikes.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT, run_ranks

from d2v_scale.conversion import demo
from d2v_scale.tracking import read_records

STEPS = 24
RULE = {"factor": 3, "after": 4, "window": 6, "leave_out": 2}


def train(run_dir: Path, shards: Path, world_size: int, stage: int, **more: Any) -> list[dict[str, Any]]:
    """Stage 0 stands for two pipeline stages. Returns the records of steps, without those of time."""
    settings = {
        "--recipe": "demo_vision",
        "--run_dir": run_dir,
        "--data": shards / "train.index.json",
        "--evaluation.train": "null",
        "--evaluation.test": "null",
        "--deepspeed_config": ROOT / "ds_configs" / f"zero{max(1, stage)}.json",
        "--parallel.pipeline": 1 if stage else 2,
        "--teacher.placement": "cpu",
        "--stop_at": STEPS,
        "--checkpoint.every": 5,
        "--global_batch_size": 8,
        "--optim.warmup_steps": 2,
        "--tracking.enabled": "false",
        "--tracking.log_every": 1,
        "--tracking.plot_every": "null",
        **{f"--{name}": value for name, value in more.items()},
    }
    run_ranks(world_size, ROOT / "d2v_scale" / "train.py", *[str(text) for pair in settings.items() for text in pair])
    return [record for record in read_records(run_dir) if "loss" in record]


def rule(on_spike: str) -> dict[str, Any]:
    return {f"optim.spikes.{key}": value for key, value in {"on_spike": on_spike, **RULE}.items()}


def spikes(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "spikes.jsonl").read_text().splitlines()]


FIGURES = ("step", "samples", "loss", "grad_norm", "target_std", "teacher_norm", "lr", "updates", "data/left_out")


def figures(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    assert any(name.startswith("loss/masked_") for record in records for name in record)
    return [
        {name: value for name, value in record.items() if name in FIGURES or name.startswith("loss/masked_")}
        for record in records
    ]


def check_rewind(tmp_path: Path, world_size: int, stage: int, log_every: int = 1) -> list[dict[str, Any]]:
    shards, logged = demo.write("vision", tmp_path / "demo_data"), {"tracking.log_every": log_every}
    rewound = train(tmp_path / "rewound", shards, world_size, stage, **rule("rewind"), **logged)
    found = spikes(tmp_path / "rewound")
    assert found, "the rule has found no spike"
    assert {line["answer"] for line in found} == {"rewind"}
    left_out = [one for line in found for one in line["left_out"]]
    ranges = {"data.leave_out": json.dumps(left_out)}
    planned = train(tmp_path / "planned", shards, world_size, stage, **ranges, **logged)
    assert figures(rewound) == figures(planned)
    assert [record["step"] for record in rewound] == [
        step for step in range(1, STEPS + 1) if step in (1, STEPS) or step % log_every == 0
    ]
    assert rewound[-1]["data/left_out"] > 0
    return found


def test_a_run_that_goes_back_is_one_that_was_planned_without_these_samples(tmp_path: Path) -> None:
    check_rewind(tmp_path, 1, 1)


@pytest.mark.slow
def test_records_between_which_a_run_goes_back_hold_nothing_that_was_taken_back(tmp_path: Path) -> None:
    check_rewind(tmp_path, 1, 1, log_every=3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_go_back_together_and_leave_out_what_one_process_would(tmp_path: Path, stage: int) -> None:
    found = check_rewind(tmp_path, 2, stage)
    train(tmp_path / "alone", tmp_path / "demo_data" / "vision", 1, max(1, stage), **rule("rewind"))
    alone = spikes(tmp_path / "alone")
    assert [(line["step"], line["left_out"]) for line in alone] == [(line["step"], line["left_out"]) for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_skipped_spike_changes_nothing(tmp_path: Path, stage: int) -> None:
    shards = demo.write("vision", tmp_path / "demo_data")
    records = train(tmp_path / "run", shards, 2, stage, **rule("skip"))
    found = {line["step"] for line in spikes(tmp_path / "run")}
    assert found
    for before, after in itertools.pairwise(records):
        was_applied = after["step"] not in found
        assert after["updates"] == before["updates"] + was_applied
        assert after["skipped_updates"] == before["skipped_updates"] + (not was_applied)
