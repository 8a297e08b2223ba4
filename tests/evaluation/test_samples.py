"""Samples to look at while training, where the recipe names none with labels."""

import logging
from pathlib import Path

import pytest
import torch
from small_shards import image_samples, sound_samples

from d2v_scale import command_line
from d2v_scale.errors import DataError
from d2v_scale.evaluation.config import EvaluationSet
from d2v_scale.evaluation.samples import Samples, named_for, samples_without_labels
from d2v_scale.modalities.speech.decoder import measure
from d2v_scale.recipe import Recipe
from d2v_scale.shards.writing import Sample, write_set


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """30 images in three shards, without labels."""
    samples = [{key: value for key, value in sample.items() if key != "cls"} for sample in image_samples(30)]
    write_set(tmp_path, "train", "image", samples, per_shard=10)
    return tmp_path


def recipe_of(shards: Path, *options: str) -> Recipe:
    recipe, _ = command_line.parse(
        [
            *("--recipe", "demo_vision", "--data", f"{shards}/train-*.tar", "--objective.masking.clones", "4"),
            *("--evaluation.train", "null", "--evaluation.test", "null", "--evaluation.batch_size", "8", *options),
        ]
    )
    return recipe


def look_at(recipe: Recipe, limit: int, *, masked: bool) -> Samples | None:
    [stem] = recipe.model.modalities
    return samples_without_labels(recipe, stem, named_for(recipe, stem), limit, masked=masked)


def test_without_any_named_a_few_of_the_first_shard_are_looked_at_always_masked_alike(shards: Path) -> None:
    (shards / "train-000001.tar").unlink()
    (shards / "train-000001.tar").write_bytes(b"")  # is not read
    found, again = (look_at(recipe_of(shards), 256, masked=True) for _ in range(2))
    assert found is not None
    assert again is not None
    assert found.trained_on
    batches = [batch for batch, _ in found.batches]
    assert sum(len(batch.keys) for batch in batches) == 10
    assert [batch.masked_rt.shape[0] for batch in batches] == [8] * 5  # rows of a pass: two samples, four clones
    for batch, (other, _) in zip(batches, again.batches, strict=True):
        assert torch.equal(batch.masked_rt, other.masked_rt)
    pictures = look_at(recipe_of(shards), 4, masked=False)
    assert pictures is not None
    assert [labels.tolist() for _, labels in pictures.batches] == [[-1] * 4]
    assert not any(batch.masked_rt.any() for batch, _ in pictures.batches)


def test_named_shards_come_first_and_must_be_readable(shards: Path) -> None:
    write_set(shards, "other", "image", image_samples(6), per_shard=6, classes=["a", "b", "c"])
    found = look_at(recipe_of(shards, "--evaluation.held_out", f"{shards}/other-*.tar"), 5, masked=True)
    assert found is not None
    assert not found.trained_on
    assert sum(len(batch.keys) for batch, _ in found.batches) == 5
    with pytest.raises(DataError, match="No shard matches"):
        look_at(recipe_of(shards, "--evaluation.held_out", f"{shards}/none-*.tar"), 5, masked=True)


def test_held_out_samples_are_read_under_as_many_masks_as_are_wanted(shards: Path) -> None:
    write_set(shards, "other", "image", image_samples(6), per_shard=6, classes=["a", "b", "c"])
    recipe = recipe_of(shards, "--evaluation.held_out", f"{shards}/other-*.tar", "--objective.masking.clones", "2")
    found = samples_without_labels(recipe, "vision", named_for(recipe, "vision"), 6, masked=True, views=5)
    assert found is not None
    assert len(found.redrawn) == 2  # of two clones each, with the first reading
    readings = [[batch for batch, _ in found.batches], *found.redrawn]
    assert len({tuple(batch.keys for batch in reading) for reading in readings}) == 1
    masks = {batch.masked_rt.numpy().tobytes() for reading in readings for batch in reading[:1]}
    assert len(masks) == 3
    trained_on = samples_without_labels(recipe_of(shards), "vision", EvaluationSet(), 6, masked=True, views=5)
    assert trained_on is not None
    assert not trained_on.redrawn


def test_training_shards_without_an_index_are_left_alone(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in [*shards.glob("*.index"), *shards.glob("*.index.json")]:
        path.unlink()
    with caplog.at_level(logging.INFO):
        assert look_at(recipe_of(shards), 256, masked=True) is None
    assert "evaluation.held_out" in caplog.text


def test_held_out_masks_are_trimmed_as_those_of_training_are(shards: Path) -> None:
    options = ("--objective.masking.kind", "spans", "--objective.masking.length", "2")
    for trimmed in (True, False):
        recipe = recipe_of(shards, *options, "--objective.compat.equalize_masks", str(trimmed).lower())
        found = look_at(recipe, 256, masked=True)
        assert found is not None
        assert all(batch.layout.visible_rs is not None for batch, _ in found.batches) == trimmed


def test_recordings_too_short_for_training_are_not_looked_at(tmp_path: Path) -> None:
    write_set(tmp_path, "train", "recording", sound_samples(8, seconds=(0.001, 0.02)), per_shard=8, measure=measure)
    write_set(tmp_path, "mixed", "recording", [*sound_samples(5), *short_ones()], per_shard=8, measure=measure)

    def look(name: str) -> Samples | None:
        options = ["--recipe", "demo_speech", "--data", f"{tmp_path}/{name}-*.tar"]
        none = ["--data.speech.min_seconds", "0.1", "--evaluation.train", "null", "--evaluation.test", "null"]
        return look_at(command_line.parse([*options, *none])[0], 256, masked=True)

    assert look("train") is None
    found = look("mixed")
    assert found is not None
    assert sum(len(batch.keys) for batch, _ in found.batches) == 5


def short_ones() -> list[Sample]:
    return [{**sample, "__key__": f"short-{k}"} for k, sample in enumerate(sound_samples(3, seconds=(0.001, 0.02)))]
