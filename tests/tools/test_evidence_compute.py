"""Evidence over compute: equal FLOPs, cuts and parts of labels, rows that are kept, arms in progress in no table."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_shards import image_samples

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import evidence_compute  # noqa: E402
import evidence_compute_sets  # noqa: E402
import evidence_curves  # noqa: E402
import evidence_jobs  # noqa: E402
import evidence_table  # noqa: E402
from evidence_sets import RealSet  # noqa: E402

from d2v_scale.command_line import parse  # noqa: E402
from d2v_scale.errors import UserError  # noqa: E402
from d2v_scale.planning.compute import step_flops  # noqa: E402
from d2v_scale.shards.shard_index import SetIndex  # noqa: E402
from d2v_scale.shards.writing import write_set  # noqa: E402


@pytest.fixture
def real(tmp_path: Path) -> RealSet:
    """Images of three classes."""
    for split, count in (("train", 30), ("test", 12)):
        write_set(tmp_path / "shards", split, "image", image_samples(count), per_shard=30, classes=["a", "b", "c"])
    return RealSet.in_folder("vision", "shapes", tmp_path / "shards")


def job_of(real: RealSet, tmp_path: Path, **changed: Any) -> evidence_compute.ComputeJob:
    cut = evidence_compute_sets.CutSet("shapes", "vision", "shapes", (real,))
    said: dict[str, Any] = {"cut": cut, "recipe": "tiny2_vision", "compute": 4.0, "seed": 1} | changed
    return evidence_compute.ComputeJob(**said, rows=tmp_path / "rows", out=tmp_path / "out")


@pytest.mark.parametrize("text", ["", "1,", "0", "1,-4", "nan", "inf", "a"])
def test_computes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--compute"):
        evidence_compute.computes_of(text)


def test_every_recipe_gets_the_same_flops_and_what_it_counts_in_steps_stretches(real: RealSet, tmp_path: Path) -> None:
    first = parse(["--recipe=tiny1_vision", f"--data={real.train}"])[0]
    wanted = 4 * first.optim.max_steps * step_flops(first)
    for name in evidence_compute.recipes_of("vision"):
        job = job_of(real, tmp_path, recipe=name)
        usual, stretched = parse([f"--recipe={name}"])[0], parse(job.arguments(real))[0]
        assert job.steps(real)[1] == pytest.approx(wanted, rel=0.01)
        share = stretched.optim.max_steps / usual.optim.max_steps
        assert stretched.optim.warmup_steps == int(share * usual.optim.warmup_steps)
        assert stretched.objective.ema.anneal_steps == round(share * usual.objective.ema.anneal_steps)


def test_a_row_is_kept_until_recipe_data_compute_seed_or_fine_tuning_change(real: RealSet, tmp_path: Path) -> None:
    job = job_of(real, tmp_path)
    assert not job.is_done()
    job.result.parent.mkdir(parents=True)
    job.result.write_text(json.dumps({"digest": job.digest, "finetuned_1": 0.3, "finetuned_10": 0.4}))
    assert job.is_done()
    assert job_of(real, tmp_path).digest == job.digest
    more = evidence_compute.FineTuning(steps=9)
    others = [job_of(real, tmp_path, **one) for one in ({"compute": 1.0}, {"seed": 2}, {"fine_tuning": more})]
    others.append(job_of(real, tmp_path, recipe="tiny1_vision"))
    digests = {job.digest, *(other.digest for other in others)}
    index = Path(real.test)
    index.write_text(index.read_text() + " ")
    assert len(digests | {job_of(real, tmp_path).digest}) == 6
    assert not job_of(real, tmp_path).is_done()


def test_a_row_of_probes_alone_is_done_until_fine_tuning_is_asked_for(real: RealSet, tmp_path: Path) -> None:
    probed, whole = job_of(real, tmp_path, learns_labels=False), job_of(real, tmp_path)
    probed.result.parent.mkdir(parents=True)
    probed.result.write_text(json.dumps({"digest": probed.digest, "knn": 0.3, "linear": 0.4}))
    assert probed.is_done()
    assert not whole.is_done()
    probed.result.write_text(json.dumps({"digest": whole.digest, "finetuned_1": 0.3, "finetuned_10": 0.4}))
    assert probed.is_done()
    assert whole.is_done()


def test_seeds_that_settings_are_chosen_on_have_no_rows(
    real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = evidence_compute_sets.CutSet("shapes", "vision", "shapes", (real,))
    found: list[evidence_compute.ComputeJob] = []
    monkeypatch.setitem(evidence_compute.SETS, "shapes", lambda data, out: cut)
    monkeypatch.setattr(evidence_compute, "_import_all", lambda: None)
    monkeypatch.setattr(evidence_compute, "run_all_forked", lambda jobs, work, processes: found.extend(jobs))
    evidence_compute.run_computes([1.0], ["shapes"], 5, tmp_path, tmp_path, tmp_path, 1)
    assert {job.seed for job in found} == {3, 4, 5, 6, 7}


def test_arms_with_a_dot_in_their_names_have_logs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hide-0.3` and `hide-0.7` both wrote to `hide-0.log`."""
    logs, fork = [], evidence_jobs.fork

    def seen(work: object, log: Path) -> int:
        logs.append(log)
        return fork(lambda: None, log)

    monkeypatch.setattr(evidence_jobs, "fork", seen)
    for arm in ("hide-0.3", "hide-0.7"):
        assert evidence_jobs.train_forked([], tmp_path / arm, arm) == []
    assert [log.name for log in logs] == ["hide-0.3.log", "hide-0.7.log"]


def test_arms_of_parts_of_a_compute_have_files_of_their_own(real: RealSet, tmp_path: Path) -> None:
    """Log and recipe of 0.2 and 0.4 were one file: they were named up to the point."""
    beside = {Path(job_of(real, tmp_path, compute=one).name).with_suffix(".log") for one in (0.2, 0.4)}
    assert len(beside) == 2


def test_a_part_of_the_labels_is_of_every_class_and_of_the_seed(real: RealSet, tmp_path: Path) -> None:
    labels = [0] * 60 + [1] * 29 + [2]
    rows = evidence_compute_sets.chosen_rows(labels, 0.1, 1)
    assert [[labels[row] for row in rows].count(label) for label in range(3)] == [6, 3, 1]
    assert (
        rows == evidence_compute_sets.chosen_rows(labels, 0.1, 1) != evidence_compute_sets.chosen_rows(labels, 0.1, 2)
    )
    index = evidence_compute_sets.with_labels(real, 0.2, 1, tmp_path / "part")
    found = SetIndex.load(Path(index))
    assert (found.samples, found.classes, found.content) == (6, ["a", "b", "c"], "image")


def test_every_take_is_test_in_one_fold_and_every_recording_of_a_speaker_in_his(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{digit}_{who}_{take}.wav" for digit in range(2) for who in ("ann", "bo") for take in range(50)]
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for name in names:
        (recordings / name).touch()
    patterns: list[tuple[str, str]] = []
    monkeypatch.setattr(evidence_compute_sets, "recordings_of", lambda data, out: recordings)
    monkeypatch.setattr(
        evidence_compute_sets,
        "make_shards",
        lambda *said, out, split: patterns.append((split, said[said.index("--match") + 1])),
    )
    for cut, count in ((evidence_compute_sets.digits, 5), (evidence_compute_sets.digits_speakers, 2)):
        patterns.clear()
        assert len(cut(tmp_path, tmp_path / "out").cuts) == count
        parts = [{name for name in names if re.search(match, name)} for _, match in patterns]
        tests = [part for part, (split, _) in zip(parts, patterns, strict=True) if split == "test"]
        trains = [part for part, (split, _) in zip(parts, patterns, strict=True) if split == "train"]
        assert sorted(name for part in tests for name in part) == sorted(names)
        assert [sorted(train | test) for train, test in zip(trains, tests, strict=True)] == [sorted(names)] * count
        assert not any(train & test for train, test in zip(trains, tests, strict=True))
    assert {name.split("_")[1] for name in tests[0]} == {"ann"}


def test_images_of_both_sets_are_learned_from_and_those_of_the_large_one_are_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cifar10", "cifar10_large"):
        for split in ("train", "test"):
            (folder := tmp_path / "data" / name / split / "cat").mkdir(parents=True)
            (folder / "1.jpg").write_text(f"{name} {split}")
    monkeypatch.setattr(evidence_compute_sets, "make_shards", lambda *said, out, split: None)
    evidence_compute_sets.cifar(tmp_path / "data", tmp_path / "out")
    (joined,) = (tmp_path / "out" / "joined").iterdir()
    found = {
        split: sorted(path.read_text() for path in (joined / split / "cat").iterdir()) for split in ("train", "test")
    }
    assert found == {"train": ["cifar10 train", "cifar10_large train"], "test": ["cifar10_large test"]}


def test_other_data_in_their_place_are_cut_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of the data of before were taken for theirs, and rows kept."""
    made: list[Path] = []
    monkeypatch.setattr(evidence_compute_sets, "make_shards", lambda *said, out, split: made.append(out))
    data, out = tmp_path / "data", tmp_path / "out"
    files = [data / f"{name}/{split}/cat/1.jpg" for name in ("cifar10", "cifar10_large") for split in ("train", "test")]
    recording, another = (data / "fsdd" / "recordings" / f"1_ann_{take}.wav" for take in (0, 7))
    for file in [*files, recording, another]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = []
    for changed in (None, files[1], files[3], recording):
        if changed is not None:
            changed.write_text("another")
        made.clear()
        for cut in ("cifar", "digits", "digits_speakers"):
            evidence_compute_sets.SETS[cut](data, out)
        found.append({path.name for path in made})
    images = [{name for name in names if "cifar" in name} for names in found]
    sounds = [names - of_images for names, of_images in zip(found, images, strict=True)]
    assert len({frozenset(names) for names in images}) == 3
    assert sounds[0] == sounds[1] == sounds[2]
    assert not sounds[2] & sounds[3]


def row(recipe: str, compute: float, seed: int, linear: float) -> dict[str, Any]:
    without = {"random_knn": 0.3, "random_linear": 0.35, "scratch_1": 0.2, "scratch_10": 0.4}
    found = {"knn": linear - 0.1, "linear": linear, "finetuned_1": 0.25, "finetuned_10": 0.5}
    cost = {"steps": 100 * compute, "flops": 1e12 * compute, "hours": 0.1 * compute}
    return {"set": "shapes", "recipe": recipe, "compute": compute, "seed": seed, **found, **without, **cost}


def test_an_arm_in_progress_is_in_no_table_and_in_no_picture(tmp_path: Path) -> None:
    (folder := tmp_path / "compute_shapes").mkdir()
    assert evidence_table.compute_table(tmp_path) == ""
    assert evidence_curves.draw(tmp_path, tmp_path / "pictures") == []
    for recipe, compute, seeds in (("tiny1_x", 1.0, 3), ("tiny2_x", 1.0, 2), ("tiny1_x", 4.0, 3), ("tiny1_x", 64.0, 1)):
        for seed in range(seeds):
            made = row(recipe, compute, seed, 0.5 + 0.01 * seed)
            (folder / f"{recipe}-x{compute:g}-seed-{seed}.json").write_text(json.dumps(made))
    text = evidence_table.compute_table(tmp_path)
    assert "| tiny1_x | 1 | 100 | 1.0e+12 | 0.10 | 41.0 ± 1.0 | 51.0 ± 1.0 | 25.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| tiny1_x | 64 | 6400 | 6.4e+13 | 6.40 | 40.0 | 50.0 | 25.0 | 50.0 |" in text
    assert "| tiny1_x, without pretraining | 0 |  |  |  | 30.0 ± 0.0 | 35.0 ± 0.0 | 20.0 ± 0.0 | 40.0 ± 0.0 |" in text
    assert "tiny2_x" not in text
    (picture,) = evidence_curves.draw(tmp_path, tmp_path / "pictures")
    assert picture.stat().st_size > 5000


def test_recipes_are_compared_by_seed_and_a_row_of_probes_alone_leaves_its_cells_empty(tmp_path: Path) -> None:
    (folder := tmp_path / "compute_shapes").mkdir()
    for recipe, gain in (("tiny2_x", 0.0), ("tiny3_x", 0.02)):
        for seed in (3, 4, 5):
            made = row(recipe, 1.0, seed, 0.5 + 0.01 * seed + gain)
            probed = {key: value for key, value in made.items() if not key.startswith(("finetuned", "scratch"))}
            (folder / f"{recipe}-x1-seed-{seed}.json").write_text(json.dumps(probed))
    text = evidence_table.compute_table(tmp_path)
    assert "| tiny3_x | 1 | 100 | 1.0e+12 | 0.10 | 46.0 ± 1.0 | 56.0 ± 1.0 |  |  |" in text
    assert "- tiny3_x, compute 1, against tiny2_x, paired by seed: k-NN +2.0, 95 % from +2.0 (above 0: yes)" in text
    assert "- tiny2_x, compute 1, against its random start, paired by seed: k-NN +14.0" in text
    assert "tiny2_x, compute 1, against tiny3_x" not in text
    assert len(evidence_curves.draw(tmp_path, tmp_path / "pictures")) == 1


def test_the_table_of_the_benchmarks_is_that_of_the_rows() -> None:
    text = (ROOT / "BENCHMARKS.md").read_text()
    for part in evidence_table.compute_table(ROOT / "docs" / "evidence").split("\n\n"):
        assert part.strip() in text


def test_labels_are_learned_with_the_pretrained_model_or_the_same_from_scratch(real: RealSet, tmp_path: Path) -> None:
    for kind in ("vision", "speech", "text"):
        for name in evidence_compute.recipes_of(kind):
            cut = evidence_compute_sets.CutSet("some", kind, "some", (real,))
            job = job_of(real, tmp_path, cut=cut, recipe=name)
            made = {
                scratch: evidence_compute.fine_tuning_recipe(job, real, real.train, from_scratch=scratch)
                for scratch in (True, False)
            }
            path = tmp_path / "scratch.yaml"
            path.write_text(json.dumps(made[True]))
            recipe = parse([f"--recipe={path}"])[0]
            recipe.check(1)
            assert recipe.model.backbone == parse([f"--recipe={name}"])[0].model.backbone
            assert {key for key in made[True] if made[True][key] != made[False].get(key)} == {"task", "model"}


@pytest.mark.slow
def test_a_row_has_all_its_figures_and_is_found_once(real: RealSet, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.append('tools'); import evidence_compute as e, evidence_compute_sets as s\n"
        "from pathlib import Path; from evidence_jobs import run_all_forked; from evidence_sets import RealSet\n"
        f"real = RealSet('vision', 'shapes', {real.train!r}, {real.test!r}); out = Path({str(tmp_path)!r})\n"
        "cut = s.CutSet('shapes', 'vision', 'shapes', (real,)); e._import_all()\n"
        "few = e.FineTuning(steps=2, batch_size=4)\n"
        "jobs = [e.ComputeJob(cut, 'tiny2_vision', c, 0, out / 'rows', out / 'out', few) for c in (0.002, 0.004)]\n"
        "run_all_forked(jobs, e.measure, 1)\n"
    )
    for said in ("2 results, 0 of them finished before", "2 results, 2 of them finished before"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert said in done.stdout
    found = json.loads((tmp_path / "rows" / "compute_shapes" / "tiny2_vision-x0.004-seed-0.json").read_text())
    measures = (
        "knn",
        "linear",
        "random_knn",
        "random_linear",
        "scratch_1",
        "scratch_10",
        "finetuned_1",
        "finetuned_10",
    )
    assert all(0 <= found[name] <= 1 for name in measures)
    assert (found["train_samples"], found["test_samples"], found["compute"]) == (30, 12, 0.004)
    assert {"digest", "commit", "flops", "hours", "steps"} <= set(found)
    assert len(list((tmp_path / "out" / "untrained").glob("*.probe.json"))) == 1, "the start is the same at any compute"
