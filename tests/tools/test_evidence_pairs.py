"""Evidence in pairs: a bound is a bound, rows are kept, the table is that of BENCHMARKS.md, mistakes are said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import evidence_pairs  # noqa: E402
import evidence_pairs_table  # noqa: E402
import evidence_sets  # noqa: E402

from d2v_scale.command_line import parse  # noqa: E402
from d2v_scale.errors import UserError  # noqa: E402
from d2v_scale.shards.shard_index import SetIndex  # noqa: E402

TINY = """
name: vowels
global_batch_size: 4
model:
  visible_only: true
  arrays: {vowels: {channels: 2, axes: {time: {patch: 1, extent: 8}}}}
  backbone: {width: 16, heads: 2, ffn: 32, depth: 4}
  predictor: {kind: conv, width: 8, kernel: 3, groups: 2, layers: 1, residual: true}
objective:
  masking: {kind: blocks, size: 2, prob: 0.5}
  target: {top_k_layers: 2}
optim: {lr: 1.0e-3, warmup_steps: 1, max_steps: 3}
"""


def rows_of(gains: list[float]) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "knn": 0.5 + gain, "random_knn": 0.5, "linear": 0.6, "random_linear": 0.6 + gain / 100}
        for seed, gain in enumerate(gains)
    ]


def write_series(root: Path, name: str, count: int = 6) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = root / name / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                np.save(folder / f"{k}.npy", rng.standard_normal((2, 5 + k % 4)).astype(np.float32))


def test_the_bound_is_that_of_the_two_sided_interval_of_students_t() -> None:
    gains = [2.0, 3.5, 1.0, 4.0, 2.5]
    interval = stats.ttest_1samp(gains, 0.0).confidence_interval(0.95)
    assert evidence_pairs_table.lower_bound(gains) == pytest.approx(interval.low)
    assert evidence_pairs_table.lower_bound([1.0, 1.0, 1.0]) == 1.0


def test_a_gain_within_its_spread_is_said_to_be_none() -> None:
    raw = {"knn": 0.7, "linear": 0.8}
    text = evidence_pairs_table.table({"x": rows_of([0.1, 0.2, 0.3])}, {"x": raw}, {"x": "Some set"})
    assert "| Some set | k-NN | 70.0 | 50.0 ± 0.0 | 70.0 ± 10.0 | +20.0 | -4.8 | **no** |" in text
    surer = evidence_pairs_table.table({"x": rows_of([0.2, 0.2, 0.21])}, {"x": raw}, {"x": "Some set"})
    assert "| +20.3 | +18.9 | yes |" in surer
    alone = evidence_pairs_table.table({"x": rows_of([0.2])}, {"x": raw}, {"x": "Some set"})
    assert "| 50.0 | 70.0 | +20.0 |  | one seed |" in alone


def test_arms_are_compared_by_seed() -> None:
    rows = {"a": rows_of([0.1, 0.3, 0.2])[::-1], "b": rows_of([0.0, 0.2, 0.1, 0.9])}
    text = evidence_pairs_table.comparison(rows, "a", "b", {"a": "A", "b": "B"})
    assert text.startswith("- A against B, paired by seed: k-NN +10.0, 95 % from +10.0 (above 0: yes)")


def test_an_arm_in_progress_is_in_no_table(tmp_path: Path) -> None:
    shutil.copytree(evidence_pairs.ROWS / "osu_leaf", tmp_path / "osu_leaf")
    assert "OSULeaf" in evidence_pairs.written(tmp_path)
    (tmp_path / "osu_leaf" / "seed-4.json").unlink()
    assert evidence_pairs.written(tmp_path) == ""
    assert "OSULeaf" in evidence_pairs.written(tmp_path, seeds=4)


def test_the_table_of_the_benchmarks_is_that_of_the_rows() -> None:
    text = (ROOT / "BENCHMARKS.md").read_text()
    for part in evidence_pairs.written(evidence_pairs.ROWS).split("\n\n"):
        assert part.strip() in text


@pytest.mark.parametrize("name", evidence_pairs.ARMS)
def test_every_arm_has_a_recipe_and_its_rows_come_seed_by_seed(name: str) -> None:
    arm = evidence_pairs.ARMS[name]
    job = evidence_pairs.PairJob(name, 0, "train.index.json", "test.index.json", evidence_pairs.ROWS, Path("out"))
    recipe, _ = parse(job.arguments())
    recipe.check(1)
    assert arm.stem in recipe.model.modalities
    rows = evidence_pairs._rows_of(evidence_pairs.ROWS / name)
    assert [row["seed"] for row in rows] == list(range(len(rows)))
    assert len(rows) <= evidence_pairs.SEEDS
    assert {row["steps"] for row in rows} <= {recipe.optim.max_steps}
    assert {row["recipe"] for row in rows} <= {job.recipe_digest}
    assert {row["arm"] for row in rows} <= {name}


def test_images_become_arrays_of_the_same_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "pets" / split / label
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (6, 4, 3)).astype(np.uint8)).save(folder / "0.png")
    found = evidence_sets.image_arrays("pets", tmp_path / "data", tmp_path / "out")
    index = SetIndex.load(Path(found.train))
    assert (index.content, index.samples, index.classes) == ("array", 2, ["cat", "dog"])
    stored = np.load(tmp_path / "out" / "pixels" / "pets" / "train" / "dog" / "0.npy")
    with Image.open(tmp_path / "data" / "pets" / "train" / "dog" / "0.png") as image:
        assert np.array_equal(stored, np.asarray(image).transpose(2, 0, 1))


def test_sets_that_are_not_there_and_arms_that_are_none_are_said(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    arguments = (1, lambda: data, tmp_path / "rows", tmp_path / "out", 1)
    with pytest.raises(UserError, match=r"--pairs names vowels, which is none. There is digits_waveform, "):
        evidence_pairs.run_pairs(["vowels"], *arguments)
    with pytest.raises(UserError, match=r"holds no JapaneseVowels, as a folder or in an archive"):
        evidence_pairs.run_pairs(["japanese_vowels"], *arguments)
    (data / "JapaneseVowels" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"JapaneseVowels has no folder test"):
        evidence_pairs.run_pairs(["japanese_vowels"], *arguments)


@pytest.mark.slow
def test_rows_are_written_once_and_again_for_another_recipe(tmp_path: Path) -> None:
    write_series(tmp_path / "data", "JapaneseVowels")
    recipe = tmp_path / "rows" / "japanese_vowels" / "recipe.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(TINY)

    def call(*more: str) -> str:
        command = [sys.executable, str(ROOT / "tools" / "evidence.py"), "--pairs", "japanese_vowels", "--seeds", "2"]
        command += ["--data", str(tmp_path / "data"), "--rows", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--jobs", "1", *more], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "3 results, 0 of them finished before" in call()
    row = json.loads((recipe.parent / "seed-1.json").read_text())
    assert (row["arm"], row["seed"], row["steps"]) == ("japanese_vowels", 1, 3)
    assert {"knn", "linear", "random_knn", "random_linear", "commit", "target_rank"} <= set(row)
    said = call()
    assert "3 results, 3 of them finished before" in said
    assert "| JapaneseVowels | k-NN |" in said
    recipe.write_text(TINY.replace("lr: 1.0e-3", "lr: 2.0e-3"))
    assert "3 results, 0 of them finished before" in call()
