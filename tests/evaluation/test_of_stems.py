"""Every stem of a run is measured by itself: shards that are named for all, and those of single stems."""

import logging
from collections.abc import Iterable
from pathlib import Path

import paired_shards
import pytest
from small_shards import image_samples

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.evaluation.config import EvaluationSet
from d2v_scale.evaluation.of_stems import under_stem
from d2v_scale.evaluation.samples import named_for, samples_without_labels
from d2v_scale.recipe import Recipe
from d2v_scale.run_files.recipe_paths import absolute
from d2v_scale.shards.writing import write_set

STEMS = ("vision", "speech", "text")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of an image, a recording and a text; and images alone beside them."""
    folder = tmp_path_factory.mktemp("pairs")
    paired_shards.write_pairs(folder / "all", paired_shards.paired_samples(12), per_shard=6)
    write_set(folder, "images", "image", image_samples(6, side=16), per_shard=6, classes=["a", "b", "c"])
    return folder


def recipe_of(folder: Path, options: Iterable[str]) -> Recipe:
    path = paired_shards.write_recipe(folder / "pairs.yaml", folder / "all" / "train.index.json")
    return command_line.parse(["--recipe", str(path), *options])[0]


def test_every_stem_is_looked_at_in_shards_that_are_named_for_all(pairs: Path) -> None:
    shards = str(pairs / "all" / "train.index.json")
    recipe = recipe_of(pairs, ["--evaluation.held_out", shards, "--evaluation.batch_size", "4"])
    for stem in STEMS:
        named = named_for(recipe, stem)
        assert named == EvaluationSet(held_out=shards)
        found = samples_without_labels(recipe, stem, named, 6, masked=True)
        assert found is not None
        assert {batch.modality for batch, _ in found.batches} == {stem}
        assert all(batch.masked_rt.any() and batch.clones == 2 for batch, _ in found.batches)


def test_a_few_training_samples_of_every_stem_are_looked_at_where_none_are_named(pairs: Path) -> None:
    """A source of paired samples was left alone."""
    for stem in STEMS:
        found = samples_without_labels(recipe_of(pairs, []), stem, EvaluationSet(), 6, masked=False)
        assert found is not None
        assert found.trained_on
        assert {batch.modality for batch, _ in found.batches} == {stem}


def test_a_stem_that_named_shards_hold_nothing_of_is_said(pairs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first stem alone was looked at, and nothing was said of the others."""
    images, own = str(pairs / "images.index.json"), str(pairs / "all" / "train.index.json")
    recipe = recipe_of(pairs, ["--evaluation.test", images, "--evaluation.sets.text.held_out", own])
    with caplog.at_level(logging.INFO):
        assert [named_for(recipe, stem) for stem in STEMS] == [
            EvaluationSet(test=images),
            EvaluationSet(),
            EvaluationSet(held_out=own),
        ]
    assert [record.getMessage() for record in caplog.records] == [
        "evaluation.test holds nothing that speech reads: evaluation.sets.speech.test may name some."
    ]


def test_sets_of_stems_are_named_on_the_command_line_and_their_paths_become_absolute(pairs: Path) -> None:
    given = ["--evaluation.sets.vision.train", "a.tar", "--evaluation.sets.vision.test=null"]
    recipe = absolute(recipe_of(pairs, given))
    assert recipe.evaluation.sets == {"vision": EvaluationSet(train=str(Path.cwd() / "a.tar"))}
    assert recipe.evaluation.shards == [str(Path.cwd() / "a.tar")]
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.touch: is set, but the model has no stem touch"):
        recipe_of(pairs, ["--evaluation.sets.touch.test", "a.tar"]).check(1)
    with pytest.raises(ConfigError, match=r"Did you mean 'evaluation\.sets\.vision\.train'"):
        recipe_of(pairs, ["--evaluation.sets.vision.trian", "a.tar"])


def test_a_stem_stands_behind_the_figure_and_before_its_parts() -> None:
    found = under_stem({"cka": 0.5, "cka/layer_01": 0.25, "held_out_loss/target_codes": 1.0}, "text")
    assert found == {"cka/text": 0.5, "cka/text/layer_01": 0.25, "held_out_loss/text/target_codes": 1.0}
