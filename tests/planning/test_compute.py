"""Runs of equal compute."""

from pathlib import Path

import pytest
from paired_shards import paired_samples, write_pairs, write_recipe
from small_shards import sound_samples

from d2v_scale.command_line import parse
from d2v_scale.modalities.speech.decoder import measure
from d2v_scale.planning.compute import mean_size, step_flops, steps_for
from d2v_scale.planning.flops import cost_of
from d2v_scale.recipe import Recipe
from d2v_scale.shards.writing import write_set

WEIGHTS = {"vision": 2.0, "speech": 1.0, "text": 1.0}


def recipe_of(name: str, *options: str) -> Recipe:
    return parse([f"--recipe={name}", *(options or ["--data=images.tar"])])[0]


def test_a_step_is_its_samples_and_steps_are_what_the_budget_holds() -> None:
    recipe = recipe_of("tiny1_vision")
    assert step_flops(recipe) == recipe.global_batch_size * cost_of(recipe, "vision").total
    assert steps_for(recipe, 100.4 * step_flops(recipe)) == 100
    assert steps_for(recipe, 1.0) == 1


def test_both_versions_get_the_same_compute() -> None:
    first, second = recipe_of("tiny1_vision"), recipe_of("tiny2_vision")
    budget = 500 * step_flops(first)
    assert steps_for(second, budget) * step_flops(second) == pytest.approx(budget, rel=0.01)


def test_recordings_count_by_their_mean_size(tmp_path: Path) -> None:
    write_set(tmp_path, "train", "recording", sound_samples(20), per_shard=10, measure=measure, classes=["a", "b", "c"])
    recipe = recipe_of("tiny1_speech", f"--data={tmp_path}/train-*.tar")
    length = mean_size(recipe, recipe.data.sources[0], "speech")
    assert length is not None
    assert 0.2 * 16000 < length < 0.8 * 16000
    assert step_flops(recipe) == pytest.approx(32 * cost_of(recipe, "speech", length).total)


def test_every_source_counts_by_how_often_it_is_read(tmp_path: Path) -> None:
    """The first stem alone was counted, and several sources were refused."""
    index = write_pairs(tmp_path / "pairs", paired_samples(20, lacking=False))
    path = write_recipe(tmp_path / "pairs.yaml", index)
    each = [f"{{shards: {index}, modality: {name}, weight: {weight}}}" for name, weight in WEIGHTS.items()]
    sources = f"--data.sources=[{', '.join(each)}]"
    alone = {name: step_flops(recipe_of(str(path), f"--data={name}={index}")) for name in WEIGHTS}
    mixed = sum(WEIGHTS[name] * alone[name] for name in WEIGHTS) / sum(WEIGHTS.values())
    assert step_flops(recipe_of(str(path), sources)) == pytest.approx(mixed)
    together = recipe_of(str(path), sources, "--data.mixing=together", "--accumulation=3")
    assert step_flops(together) == pytest.approx(sum(alone.values()))
    # Of one sequence attention is over all parts, and everything else as in each alone.
    paired = step_flops(recipe_of(str(path), f"--data={index}"))
    assert sum(alone.values()) < paired < 2 * sum(alone.values())


def test_sources_that_are_repeated_come_by_their_batches(tmp_path: Path) -> None:
    """They were refused."""
    index = write_pairs(tmp_path / "pairs", paired_samples(20, lacking=False))
    path = write_recipe(tmp_path / "pairs.yaml", index)
    vision, speech = (step_flops(recipe_of(str(path), f"--data={name}={index}")) for name in ("vision", "speech"))
    each = [
        f"{{shards: {index}, modality: {name}, repeat: {repeat}, batch_size: {size}}}"
        for name, repeat, size in (("vision", 2, 4), ("speech", 1, 8))
    ]
    found = step_flops(recipe_of(str(path), f"--data.sources=[{', '.join(each)}]"))
    # 10 batches of half the size for every 2.5 whole ones.
    assert found == pytest.approx(0.8 * vision / 2 + 0.2 * speech)


@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
def test_the_tiny_recipes_of_a_modality_have_the_same_encoder(modality: str) -> None:
    first, second = (recipe_of(f"tiny{version}_{modality}") for version in (1, 2))
    assert first.model.backbone == second.model.backbone
    assert (first.model.vision, first.model.text) == (second.model.vision, second.model.text)
    assert not first.model.visible_only
    assert second.model.visible_only
