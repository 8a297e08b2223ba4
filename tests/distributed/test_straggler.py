"""A rank that is delayed in the real training program is named within twenty steps, with what it waits for."""

import json
from pathlib import Path

import pytest
from launch import ROOT, run_ranks

from d2v_scale.conversion import demo

FROM = 10
"""The step that the delays begin at."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "stage", "words"), [("forward", 1, "its own computation"), ("data", 1, "data"), ("forward", 3, "its own")]
)
def test_a_delayed_rank_is_named_within_twenty_steps(tmp_path: Path, point: str, stage: int, words: str) -> None:
    shards = demo.write("vision", tmp_path / "demo_data")
    settings = {
        "--recipe": "demo_vision",
        "--run_dir": tmp_path / "run",
        "--data": shards / "train.index.json",
        "--evaluation.train": "null",
        "--evaluation.test": "null",
        "--deepspeed_config": ROOT / "ds_configs" / f"zero{stage}.json",
        "--stop_at": FROM + 24,
        "--global_batch_size": 8,
        "--tracking.enabled": "false",
        "--tracking.log_every": 4,
        "--tracking.plot_every": "null",
    }
    given = [str(text) for pair in settings.items() for text in pair]
    # Far more than a step takes where other programs use the processors, too.
    fault = {"D2V_FAULT": f"{point}:1:{FROM}:slow:2.0"}
    run_ranks(2, ROOT / "d2v_scale" / "train.py", *given, env=fault, timeout=400)
    [line] = [json.loads(line) for line in (tmp_path / "run" / "stragglers.jsonl").read_text().splitlines()]
    assert line["rank"] == 1
    assert line["waits_for"].startswith(words)
    assert FROM < line["step"] < FROM + 20
    paces = [json.loads(line) for line in (tmp_path / "run" / "logs" / "pace.jsonl").read_text().splitlines()]
    delayed = [line for line in paces if line["step"] > FROM + 4]
    assert all(line["communication"][0] > 1.5 for line in delayed), "the other rank waits in collectives"
