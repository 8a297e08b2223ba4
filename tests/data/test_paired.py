"""Samples of several modalities, from shards to batches."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from paired_shards import paired_samples, write_pairs, write_recipe

from d2v_scale import command_line
from d2v_scale.data.loader import StepLoader
from d2v_scale.data.source import open_source
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.recipe import Recipe


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples; of every five one has no image, one no recording, one no text."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), paired_samples(60))


def recipe_of(index: Path, tmp_path: Path, *arguments: str, **replaced: str) -> Recipe:
    path = write_recipe(tmp_path / "pairs.yaml", index, **replaced)
    return command_line.parse(["--recipe", str(path), *arguments])[0]


def loader_of(recipe: Recipe, **options: int) -> StepLoader:
    recipe.check(1)
    return StepLoader(
        recipe.data,
        recipe.model,
        recipe.masking(),
        seed=1,
        global_batch_size=recipe.global_batch_size,
        batch_unit=recipe.batch_unit,
        **options,
    )


def test_a_list_of_stems_is_one_sequence_and_its_stems_are_paired(index: Path, tmp_path: Path) -> None:
    recipe = recipe_of(index, tmp_path)
    assert recipe.data.sources[0].modality == "vision+speech+text"
    assert all(stem.paired for stem in recipe.model.stems.values())
    assert recipe.sequences == ["vision+speech+text"]
    given = f"[{{shards: {index}, modality: [vision, text]}}]"
    two = recipe_of(index, tmp_path, "--data.sources", given)
    assert two.data.sources[0].stems == ["vision", "text"]
    assert (two.model.stems["vision"].paired, two.model.stems["speech"].paired) == (True, None)
    named = recipe_of(index, tmp_path, "--data", f"text+vision={index}")
    assert named.data.sources[0].modality == "text+vision"
    other = recipe_of(index, tmp_path, "--data", "elsewhere")
    assert (other.data.sources[0].modality, other.data.sources[0].hide_whole) == ("vision+speech+text", 0.3)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[vision, speech, text]", "[vision, smell]", "no stem 'smell'"),
        ("[vision, speech, text]", "[vision, vision]", "names a stem twice"),
        ("[vision, speech, text]", "[vision, 3]", "no list of stems"),
        ("[vision, speech, text]", "vision", "no other part"),
        ("hide_whole: 0.3", "hide_whole: 1.5", "hide_whole: is 1.5"),
        ("hide_whole: 0.3", "hide_whole: -0.1", "hide_whole: is -0.1"),
        ("positions: sincos", "positions: sincos, paired: false", "model.vision.paired: is not true"),
        ("  target: {tap", "  text: {masking: {clones: 3}}\n  target: {tap", "masking.clones: differ"),
    ],
)  # fmt: skip
def test_what_no_pair_can_be_is_refused_with_its_key(
    index: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe_of(index, tmp_path, **{old: new}).check(1)


def test_shards_whose_index_lacks_a_part_are_refused(images: Path, index: Path, tmp_path: Path) -> None:
    recipe = recipe_of(images / "train.index.json", tmp_path)
    with pytest.raises(DataError, match=r"d2v index --modality vision,speech,text"):
        open_source(recipe.data, 0, recipe.model, 1, 0, 1)


def test_every_sample_goes_on_with_what_it_has(index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_of(index, tmp_path)
    loader = loader_of(recipe)
    seen: dict[str, set[str]] = {stem: set() for stem in recipe.model.stems}
    with caplog.at_level(logging.WARNING):
        while loader.state_dict()["sources"]["pairs"]["epoch"] < 1:
            [batch] = next(loader)
            assert [part.modality for part in batch.parts] == list(recipe.model.stems)
            for part in batch.parts:
                assert part.source == f"pairs/{part.modality}"
                present_b = torch.ones(len(part.keys), dtype=torch.bool) if part.present_b is None else part.present_b
                assert part.absent == int((~present_b).sum())
                seen[part.modality] |= {key for key, has in zip(part.keys, present_b.tolist(), strict=True) if has}
                predicted_rt = torch.zeros(part.masked_rt.numel(), dtype=torch.bool)
                predicted_rt[part.layout.predicted_n] = True
                predicted_rt = predicted_rt.view_as(part.masked_rt)
                present_r = present_b.repeat_interleave(2)
                assert not predicted_rt[~present_r].any()
                assert predicted_rt[present_r].any(dim=1).all()
                assert part.hidden_r is not None
                assert not (part.hidden_r & ~present_r).any()
                real_rt = (
                    torch.ones_like(predicted_rt) if part.real_bt is None else part.real_bt.repeat_interleave(2, 0)
                )
                assert torch.equal(predicted_rt[part.hidden_r], real_rt[part.hidden_r])
    taken = loader.take_counts()["pairs"]
    assert taken.epochs[0].lost == 0
    missing = [int(key[-4:]) % 5 for key in map(str, sorted(set.union(*seen.values())))]
    assert len(missing) >= 50
    for k, stem in enumerate(seen):
        assert seen[stem] == {key for key in set.union(*seen.values()) if int(key[-4:]) % 5 != k}
        assert taken.missing_parts[stem] >= 10
    assert "no speech: no such member" in caplog.text


def test_a_part_that_is_damaged_is_left_out_and_a_sample_without_any_is_lost(tmp_path: Path) -> None:
    samples = paired_samples(20, lacking=False)
    samples[3]["flac"] = b"noise"
    samples[4] = {"__key__": "pair-0004", "flac": b"noise", "txt": ""}
    samples[5] = {"__key__": "pair-0005", "json": b"{}"}
    index = write_pairs(tmp_path / "shards", samples)
    recipe = recipe_of(index, tmp_path, "--data.max_bad_ratio", "0.5")
    loader = loader_of(recipe)
    while loader.state_dict()["sources"]["pairs"]["epoch"] < 1:
        next(loader)
    taken = loader.take_counts()["pairs"]
    assert taken.missing_parts["speech"] >= 1
    assert taken.epochs[0].lost == 2
    assert taken.epochs[0].planned == taken.epochs[0].delivered + 2


def test_texts_and_recordings_that_are_cut_are_counted_by_part(tmp_path: Path) -> None:
    samples = paired_samples(16, lacking=False)
    for k, sample in enumerate(samples):
        sample["txt"] = "the quick fox " * 40 if k < 5 else "a fox"
    index = write_pairs(tmp_path / "shards", samples)
    loader = loader_of(recipe_of(index, tmp_path, "--data.speech.max_seconds", "0.6"))
    for _ in range(2):  # an epoch
        [batch] = next(loader)
        assert batch.parts[1].inputs.shape[1] <= 9600
    taken = loader.take_counts()["pairs"]
    longer = sum(len(soundfile.read(io.BytesIO(sample["flac"]))[0]) > 9600 for sample in samples)
    assert 0 < longer < 16
    assert taken.cropped_parts == {"text": 5, "speech": longer}


def test_what_of_parts_is_never_read_was_not_said_before_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = paired_samples(8, lacking=False)
    for sample in samples:
        sample["txt"] = "the quick fox " * 40
    index = write_pairs(tmp_path / "shards", samples)
    with caplog.at_level(logging.WARNING):
        next(loader_of(recipe_of(index, tmp_path)))
    told = [record.message for record in caplog.records if "cropped away" in record.message]
    [line] = told
    assert "% of the text of pairs is cropped away: 31 tokens of a sample are read (model.text.max_positions)" in line


def test_batches_are_planned_by_the_positions_of_all_parts(index: Path, tmp_path: Path) -> None:
    recipe = recipe_of(index, tmp_path, "--batch_unit", "tokens", "--global_batch_size", "300")
    loader = loader_of(recipe)
    source = loader.sources[0]
    lengths = np.concatenate([source.items.positions(shard) for shard in range(len(source.shards.paths))])
    assert (lengths > 0).all()
    batches = [next(loader)[0] for _ in range(8)]
    for batch in batches:
        held = sum(
            len(p.inputs) * p.masked_rt.shape[1] if p.real_bt is None else int(p.real_bt.sum()) for p in batch.parts
        )
        assert held <= 330
    assert batches[0].masked_rt.shape[1] == sum(part.masked_rt.shape[1] for part in batches[0].parts)


def test_steps_are_the_same_at_any_number_of_ranks(index: Path, tmp_path: Path) -> None:
    recipe = recipe_of(index, tmp_path)
    whole = [next(loader)[0] for loader in [loader_of(recipe)] for _ in range(3)]
    halves = [loader_of(recipe, dp_rank=rank, dp_size=2) for rank in range(2)]
    for batch in whole:
        parts = [next(half)[0] for half in halves]
        assert [key for part in parts for key in part.keys] == list(batch.keys)
        for number, stem in enumerate(batch.parts):
            hidden = torch.cat([part.parts[number].hidden_r for part in parts])
            assert torch.equal(hidden, stem.hidden_r)


def test_a_run_on_pairs_records_each_part_and_what_was_missing(index: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "pairs.yaml", index)
    run = [sys.executable, "-m", "d2v_scale.train", "--recipe", str(path), "--run_dir", str(tmp_path / "run")]
    done = subprocess.run([*run, "--stop_at", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "60 samples of vision + speech + text in 3 shards" in done.stdout + done.stderr
    for name in (
        "data/missing_parts/speech",
        "data/cropped_parts/text",
        "loss/pairs/vision",
        "target_std/pairs/text",
        "tflops_per_device",
    ):
        assert f'"{name}"' in record, name
    assert (tmp_path / "run" / "plots" / "first_batch_speech.png").is_file()
