"""Evidence of joint training: arms are sound and of equal compute, the tables say what rows hold, rows are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from d2v_scale.alignment.measures import recall
from d2v_scale.alignment.scoring import Features
from d2v_scale.evaluation.frozen import FrozenEncoder

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import evidence_joint  # noqa: E402
import evidence_joint_table  # noqa: E402
from evidence_joint_scores import of_classes  # noqa: E402
from evidence_joint_sets import JointSet  # noqa: E402

DATA = JointSet("digits", "train.index.json", "test.index.json", "shuffled/train.index.json", "key", "label", True)


def test_all_arms_have_the_same_compute(tmp_path: Path) -> None:
    totals = {}
    for arm in evidence_joint.ARMS:
        job = evidence_joint.JointJob(DATA, arm, 0, 40, tmp_path, tmp_path)
        recipes = [evidence_joint.parsed(said, tmp_path / "recipe.yaml") for said in job.recipes.values()]
        for recipe in recipes:
            recipe.check(1)
        totals[arm] = sum(recipe.optim.max_steps * evidence_joint.longest_step_flops(recipe) for recipe in recipes)
        assert [source.shards for recipe in recipes for source in recipe.data.sources] == [
            DATA.shuffled if arm == "shuffled" else DATA.train
        ] * (1 if arm in ("paired", "shuffled") else 3)
    assert max(totals.values()) < 1.02 * min(totals.values())
    assert totals["separate"] == pytest.approx(totals["together"])


def test_every_arm_of_a_seed_begins_with_the_same_weights_which_are_measured_once(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.index.json").write_text(name)
    data = JointSet(
        "digits", str(tmp_path / "train.index.json"), str(tmp_path / "test.index.json"), "", "key", "label", True
    )

    def recipes(arm: str, seed: int) -> dict[str, Any]:
        stems = [(stem,) for stem in evidence_joint.STEMS] if arm == "separate" else [evidence_joint.STEMS]
        said = {one[0] if arm == "separate" else "joint": evidence_joint.recipe_of(arm, one, data) for one in stems}
        path = tmp_path / "recipe.yaml"
        return {name: evidence_joint.parsed(one | {"seed": seed}, path) for name, one in said.items()}

    def digest(arm: str, seed: int) -> str:
        job = evidence_joint.JointJob(data, arm, seed, 40, tmp_path, tmp_path)
        return evidence_joint.initial_digest(job, recipes(arm, seed))

    assert len({digest(arm, 0) for arm in evidence_joint.ARMS}) == 1
    assert digest("paired", 1) != digest("paired", 0)
    for stem in evidence_joint.STEMS:
        of_both = [
            FrozenEncoder.untrained(recipes(arm, 0)[name]).model.state_dict()
            for arm, name in (("separate", stem), ("paired", "joint"))
        ]
        assert of_both[0].keys() <= of_both[1].keys()
        assert all(torch.equal(tensor, of_both[1][name]) for name, tensor in of_both[0].items())


def row(arm: str, seed: int, knn: float, mapped: float) -> dict[str, Any]:
    stems = {stem: {"knn": knn, "linear": 0.5} for stem in evidence_joint.STEMS}
    pairs = {"vision - speech": {"mapped": mapped, "same": 0.1, "chance": 0.04}}
    random = {"random_stems": stems, "random_pairs": pairs}
    return {"arm": arm, "seed": seed, "retrieval": "R@10", "stems": stems, "pairs": pairs, **random}


def test_the_tables_say_what_pairs_of_samples_change(tmp_path: Path) -> None:
    (tmp_path / "joint_concepts_800").mkdir()
    for arm, knn, mapped in (("separate", 0.5, 0.2), ("paired", 0.6, 0.5), ("shuffled", 0.4, 0.2)):
        for seed in range(3):
            made = row(arm, seed, knn, mapped + 0.01 * seed)
            (tmp_path / "joint_concepts_800" / f"{arm}-seed-{seed}.json").write_text(json.dumps(made))
    text = evidence_joint_table.written(tmp_path)
    assert "| paired | 60.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| paired | 10.0 ± 0.0 | 51.0 ± 1.0 |" in text
    assert "| chance | 4.0 | 4.0 |" in text
    assert "- paired against shuffled, mapped R@10: vision - speech +30.0, 95 % from +30.0." in text
    assert "- paired against separate, k-NN: vision +10.0, 95 % from +10.0; speech" in text
    assert evidence_joint_table.written(tmp_path / "none") == ""


def test_a_seed_that_an_arm_lacks_is_in_no_table(tmp_path: Path) -> None:
    (folder := tmp_path / "joint_digits_120").mkdir()
    for arm, seeds in (("separate", 2), ("paired", 1)):
        for seed in range(seeds):
            (folder / f"{arm}-seed-{seed}.json").write_text(json.dumps(row(arm, seed, 0.5 + seed, 0.2)))
    text = evidence_joint_table.written(tmp_path)
    assert "| digits, 120 steps, 1 seed: arm |" in text
    assert "| separate | 50.0 | 50.0 |" in text


def test_the_table_of_the_benchmarks_is_that_of_the_rows() -> None:
    text = (ROOT / "BENCHMARKS.md").read_text()
    parts = evidence_joint_table.written(evidence_joint.ROWS).strip().split("\n\n")
    assert len(parts) > 1
    for part in parts:
        assert part in text


def test_rows_of_an_arm_are_of_one_length() -> None:
    """Else their mean would be of nothing."""
    for folder in evidence_joint.ROWS.glob("joint_*"):
        rows = [json.loads(path.read_text()) for path in folder.glob("*-seed-*.json")]
        lengths = {(row["arm"], name, run["steps"]) for row in rows for name, run in row["runs"].items()}
        assert len(lengths) == len({(arm, name) for arm, name, _ in lengths})
        assert len({row["digest"] for row in rows}) == len(rows)
        totals = [sum(run["flops"] for run in row["runs"].values()) for row in rows]
        assert max(totals) < 1.02 * min(totals)


def test_samples_that_are_interchangeable_are_found_by_their_class() -> None:
    """Partners among the ten nearest were counted: a name that 15 samples share was found by none of them."""
    labels_n = torch.arange(10).repeat(15)
    of_class_nd = torch.nn.functional.one_hot(labels_n).float()
    rng = torch.Generator().manual_seed(0)
    noise_nd = torch.randn(150, 10, generator=rng)

    def scores(y_ne: torch.Tensor) -> dict[str, float]:
        features = Features(train_x_nd=of_class_nd, train_y_ne=y_ne, test_x_nd=of_class_nd, test_y_ne=y_ne)
        return of_classes([features], labels_n, labels_n)

    assert scores(of_class_nd) == pytest.approx({"mapped": 1.0, "same": 1.0, "chance": 0.1})
    assert float(recall(of_class_nd, of_class_nd, 10).mean()) == 0.0
    turned = scores(of_class_nd.roll(1, dims=1))
    assert turned == pytest.approx({"mapped": 1.0, "same": 0.0, "chance": 0.1})
    assert scores(noise_nd)["same"] == pytest.approx(0.1, abs=0.05)


def test_the_last_losses_are_those_of_a_step_not_of_what_was_recorded_after_it() -> None:
    step = {"step": 2, "loss": 1.5, "loss/text": 0.5, "lr": 0.1}
    records = [{"step": 1, "loss": 2.0, "loss/text": 1.0}, step, {"step": 2, "checkpoint_stall_seconds": 0.1}]
    assert evidence_joint.last_losses(records) == {"loss": 1.5, "loss/text": 0.5}


@pytest.mark.slow
def test_an_arm_is_trained_once(tmp_path: Path) -> None:
    (recordings := tmp_path / "data" / "fsdd" / "recordings").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for label in range(10):
        for take in range(9):
            soundfile.write(recordings / f"{label}_ada_{take}.wav", rng.normal(0, 0.1, 6000), 8000)
    command = [sys.executable, str(ROOT / "tools" / "evidence_joint.py"), "--quick", "--sets", "digits"]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--arms", "separate", "shuffled"]

    def call() -> str:
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "2 results, 0 of them finished before" in call()
    said = call()
    assert "2 results, 2 of them finished before" in said
    assert "| shuffled |" in said
    found = json.loads((tmp_path / "out" / "rows" / "joint_digits_2" / "separate-seed-0.json").read_text())
    assert found["runs"].keys() == set(evidence_joint.STEMS)
    assert found["pairs"].keys() == {"vision - speech", "vision - text", "speech - text"}
