"""Training through damaged shards on two ranks: every damage is named, the run ends well, and the counts add up."""

import itertools
import json
import time
from pathlib import Path

import pytest
from damaged_shards import DamagedSet
from launch import ROOT, start_ranks, stop
from small_shards import image_samples, sound_samples

from d2v_scale.shards.order import WindowOrder

WINDOW_SHARDS = 4


def seed_that_reads_last(made: DamagedSet) -> int:
    """A seed whose first epoch comes late to the files that are to vanish."""
    vanishing = {Path(entry.path).stem: number for number, entry in enumerate(made.entries)}
    wanted = {vanishing[path.stem] for path in made.disappearing}
    for seed in itertools.count():
        order = WindowOrder(len(made.entries), lambda _: 1, WINDOW_SHARDS, seed, made.modality)
        if wanted <= {shard for window in range(3, order.windows) for shard in order.shards(0, window)}:
            return seed
    raise AssertionError("unreachable")


@pytest.mark.parametrize("modality", ["vision", pytest.param("speech", marks=pytest.mark.slow)])
def test_a_run_trains_through_every_damage_and_accounts_for_it(tmp_path: Path, modality: str) -> None:
    samples = image_samples(200) if modality == "vision" else sound_samples(200)
    made = DamagedSet(tmp_path / "damaged", modality, samples)
    index, run_dir = made.build(), tmp_path / "run"
    settings = {
        "--recipe": f"demo_{modality}",
        "--run_dir": run_dir,
        "--data": index,
        "--seed": seed_that_reads_last(made),
        "--global_batch_size": 8,
        "--stop_at": 40,
        "--data.window_shards": WINDOW_SHARDS,
        "--data.prefetch": 1,
        "--data.max_bad_ratio": 0.9,
        "--data.read_timeout_s": 3,
        "--data.read_retries": 0,
        "--data.cache_dir": tmp_path / "cache",
        "--evaluation.train": "null",
        "--evaluation.test": "null",
        "--tracking.enabled": "false",
        "--tracking.plot_every": "null",
        "--tracking.log_every": 1,
        "--checkpoint.every": 1000,
    }
    arguments = [str(text) for pair in settings.items() for text in pair]
    ranks = start_ranks(2, ROOT / "d2v_scale" / "train.py", *arguments)
    try:
        deadline = time.monotonic() + 240
        while not (run_dir / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            assert all(rank.poll() is None for rank in ranks), ranks[0].output()[-3000:]
            time.sleep(0.02)
        for path in made.disappearing:
            path.unlink()
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        stop(ranks)
    assert codes == [0, 0], ranks[0].output()[-3000:]
    assert json.loads((run_dir / "status.json").read_text())["outcome"] == "done"

    logs = "".join(path.read_text() for path in run_dir.glob("logs/rank-*.log"))
    for shard, lost in made.expected_lost.items():
        assert (f"lost a sample: {shard}" in logs) == (lost > 0), shard
    assert "do not add up" not in logs

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "loss" in record][-1]
    assert last["data/delivered"] == last["data/planned"] - last["data/lost"]
    first_epoch = next(record for record in records if f"data/{modality}/epoch_lost" in record)
    counts = {name: first_epoch[f"data/{modality}/epoch_{name}"] for name in ("planned", "delivered", "lost")}
    expected = sum(entry.samples for entry in made.entries)
    lost = sum(made.expected_lost.values())
    assert counts == {"planned": expected, "delivered": expected - lost, "lost": lost}
