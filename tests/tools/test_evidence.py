"""The evidence: sets of the layout are found whatever their names and classes, results are kept, mistakes are said."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.append(str(TOOLS))

import evidence  # noqa: E402
import evidence_sets  # noqa: E402
import evidence_table  # noqa: E402
from small_shards import sound_samples  # noqa: E402

from d2v_scale.errors import UserError  # noqa: E402
from d2v_scale.modalities.speech.decoder import measure  # noqa: E402
from d2v_scale.shards.shard_index import SetIndex  # noqa: E402
from d2v_scale.shards.writing import write_set  # noqa: E402


def write_images(root: Path, per_class: int = 12) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, brightness in (("dark", 60), ("bright", 190)):
            folder = root / "shapes" / split / label
            folder.mkdir(parents=True)
            for k in range(per_class):
                pixels = rng.integers(brightness - 50, brightness + 50, (24, 30, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.jpg")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / "evidence.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


def test_takes_0_to_4_of_every_label_and_speaker_are_test(tmp_path: Path) -> None:
    recordings = tmp_path / "data" / "words" / "recordings"
    recordings.mkdir(parents=True)
    for label in ("yes", "no"):
        for speaker in ("ann", "bo"):
            for take in (0, 4, 5, 10, 14):
                soundfile.write(recordings / f"{label}_{speaker}_{take}.wav", np.full(4000, 0.1), 8000)
    found = evidence_sets.prepare(tmp_path / "data", tmp_path / "out", ["speech"])["speech"]
    train, test = SetIndex.load(Path(found.train)), SetIndex.load(Path(found.test))
    assert (train.samples, test.samples) == (12, 8)
    assert train.classes == test.classes == ["no", "yes"]
    assert found.name == "words"
    assert sum(shard.length for shard in test.shards) == 8 * 8000  # 16 kHz


def test_every_fifth_row_is_test_and_archives_are_unpacked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [f'"{k % 2}","Title {k}","A story of {k} words, about {k % 7} things and a fox."' for k in range(400)]
    (tmp_path / "ag_news_small.csv").write_text("\n".join(rows))
    with tarfile.open(data / "news.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "ag_news_small.csv", "ag_news_small.csv")
    (folder,) = evidence_sets._unpacked(data, tmp_path / "out")
    for split, wanted in (("train", 320), ("test", 80)):
        lines = evidence_sets._news(folder / "ag_news_small.csv", split, tmp_path / "out").read_text().splitlines()
        assert len(lines) == wanted
    assert json.loads(lines[0]) == {"text": "Title 4. A story of 4 words, about 4 things and a fox.", "label": "0"}


def write_news(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(f'"{label}","{text}"' for label, text in rows))


def test_another_set_in_the_same_out_is_not_taken_for_the_first(tmp_path: Path) -> None:
    """Shards were looked for by modality alone: a second --data was reported under its name with the first one's."""
    found = []
    for name, words in (("cats", "cat purr milk"), ("dogs", "dog bark bone")):
        write_news(tmp_path / name / "set.csv", [(str(k % 2), f"{words} {k} {words}") for k in range(60)])
        found.append(evidence_sets.prepare(tmp_path / name, tmp_path / "out", ["text"])["text"])
    assert found[0].train != found[1].train
    for real, word in zip(found, ("cat", "dog"), strict=True):
        jsonl = Path(real.train).with_name("train.jsonl").read_text()
        assert word in jsonl
        assert SetIndex.load(Path(real.train)).samples == 48  # few words: fewer pieces than wanted are enough
    again = evidence_sets.prepare(tmp_path / "cats", tmp_path / "out", ["text"])["text"]
    assert again == found[0]


def test_names_of_recordings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """`yes_a-3.wav` was left out without a word, and a label that only test takes have ended all modalities."""
    recordings = tmp_path / "data" / "words" / "recordings"
    recordings.mkdir(parents=True)
    for name in ("yes_a_3", "yes_a_7", "no_a-3"):
        soundfile.write(recordings / f"{name}.wav", np.full(4000, 0.1), 8000)
    with pytest.raises(UserError, match=r"1 names of other forms, no_a-3\.wav the first"):
        evidence_sets.prepare(tmp_path / "data", tmp_path / "out", ["speech"])
    (recordings / "no_a-3.wav").rename(recordings / "no_a_3.wav")
    with pytest.raises(UserError, match=r"Class .no. of .* is in one part only: takes 0 to 4"):
        evidence_sets.prepare(tmp_path / "data", tmp_path / "out", ["speech"])


def test_headers_rare_classes_and_repeated_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("world", f"News number {k} of the day.") for k in range(20)]
    rows[4] = ("rare", "Only in the fifth row.")
    rows[9] = rows[0]
    write_news(tmp_path / "set.csv", [("label", "text"), *rows])
    train = evidence_sets._news(tmp_path / "set.csv", "train", tmp_path / "out").read_text().splitlines()
    test = evidence_sets._news(tmp_path / "set.csv", "test", tmp_path / "out").read_text().splitlines()
    assert (len(train), len(test)) == (16, 3)
    said = capsys.readouterr().out
    assert "its first row (label, text) is taken for a header" in said
    assert "test rows of classes that training has not are left out (rare)" in said
    assert "1 test samples are in the training part, too" in said


def test_results_of_other_code_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of the package a second run printed the old numbers with the new commit."""
    for split in ("train", "test"):
        (tmp_path / split).write_text("{}")
    real = evidence_sets.RealSet("text", "news", str(tmp_path / "train"), str(tmp_path / "test"))
    job = evidence.Job("text", "1.0", 1, real, 10, (), tmp_path)
    before = job.digest
    assert job.digest == before
    monkeypatch.setattr(evidence, "code_digest", lambda: "other")
    assert job.digest != before


@pytest.mark.parametrize("arguments", [("--seeds", "0"), ("--share", "0"), ("--jobs", "0")])
def test_zero_is_no_default(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments])
    assert evidence.main() == 2
    assert "must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["missing", "empty", "no text"])
def test_wrong_folders_are_said_before_anything_starts(what: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    if what != "missing":
        data.mkdir()
    if what == "no text":
        (data / "ag_news.csv").write_text("1\n2\n")
    expected = {"missing": "is not a folder", "empty": "holds no set for text", "no text": r"without text \(row 1\)"}
    with pytest.raises(UserError, match=expected[what]):
        evidence_sets.prepare(data, tmp_path / "out", ["text"])


def test_samples_that_are_not_read_whole_are_told_in_the_unit_of_what_shards_hold(tmp_path: Path) -> None:
    long = [*sound_samples(3, seconds=(0.2, 0.4)), *sound_samples(1, seconds=(30.0, 31.0))]
    samples = [sample | {"__key__": f"sound-{k}"} for k, sample in enumerate(long)]
    for split in ("train", "test"):
        write_set(tmp_path, split, "recording", samples, per_shard=9, measure=measure, classes=["a", "b", "c"])
    real = evidence_sets.RealSet(
        "speech", "words", str(tmp_path / "train.index.json"), str(tmp_path / "test.index.json")
    )
    assert re.search(r"; 25% of the test samples are longer than [\d.]+ s, which is", evidence.describe(real))


def test_the_table_has_means_spreads_and_where_2_0_catches_up() -> None:
    raw = {"knn": 0.3, "linear": 0.35, "largest_class": 0.25}
    results: list[dict[str, Any]] = [{"modality": "vision", "row": "raw", "seed": 1, "steps": 1, **raw}]
    for seed, gain in ((1, 0.0), (2, 0.02), (3, 0.04)):
        common = {"modality": "vision", "seed": seed, "steps": 40}
        for row in ("random 1.0", "random 2.0"):
            results.append({**common, "row": row, "knn": 0.2, "linear": 0.25})
        results.append({**common, "row": "supervised", "accuracy": 0.5})
        for row, last in (("1.0", 0.4), ("2.0", 0.6)):
            signs = {"held_out_loss": 1 - gain, "held_out_explained": gain}
            curve = [{"step": step, "knn_accuracy": last * step / 40 + gain, **signs} for step in (0, 20, 40)]
            results.append({**common, "row": row, "knn": last + gain, "linear": last + gain, "curve": curve})
    text = evidence_table.table(results, {"vision": "shapes"}, {"vision": 1e12}, {"vision": "8 of 9 test samples"})
    assert "| shapes (vision) | data2vec 2.0 | 40 | 62.0 ± 2.0 | 62.0 ± 2.0 |" in text
    assert "| shapes (vision) | labels only, from scratch | 40 |  | 50.0 ± 0.0 |" in text
    assert "reaches 1.0's last k-NN at 100% of the compute" in text
    assert "- shapes: 8 of 9 test samples; the most frequent class is 25.0 % of the test samples." in text
    warning = evidence_table.early_warning(results)
    assert "| held-out loss | -1.00 (n 6) |" in warning
    assert "| k-NN | +1.00 (n 6) |" in warning


def test_2_0_is_not_compared_with_a_1_0_that_has_not_left_its_random_start() -> None:
    results: list[dict[str, Any]] = []
    for row, values in (("1.0", (0.4, 0.3, 0.35)), ("2.0", (0.4, 0.5, 0.6))):
        curve = [{"step": 10 * k, "knn_accuracy": value} for k, value in enumerate(values)]
        results.append({"modality": "text", "row": row, "seed": 1, "steps": 20, "curve": curve})
    for row in ("random 1.0", "random 2.0", "supervised", "raw"):
        results.append({"modality": "text", "row": row, "seed": 1, "steps": 20})
    text = evidence_table.table(results, {"text": "news"}, {"text": 1e12}, {"text": "all"})
    assert "1.0's k-NN has not risen above that of its random start." in text
    assert "of the compute" not in text


def test_the_folder_that_is_taken_by_default_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other" / "data").mkdir(parents=True)
    (tmp_path / "other" / "data" / "bills.csv").write_text("1,a,b\n")
    assert evidence_sets.default_folder(tmp_path / "here") == tmp_path / "other" / "data"
    assert str(tmp_path / "other" / "data") in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_way_and_nothing_twice(tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--modalities", "vision", "--jobs", "2")
    arguments += ("--seeds", "1", "--share", "0.01")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| shapes (vision) | data2vec 2.0 |" in (tmp_path / "out" / "evidence.md").read_text()
    about = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert {result["row"] for result in about["results"]} == {
        *("raw", "random 1.0", "random 2.0", "supervised", "1.0", "2.0")
    }
    again = run(*arguments)
    assert "6 results, 6 of them finished before" in again.stdout
    refused = run("--data", tmp_path / "nothing", "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "is not a folder" in refused.stderr
