"""What a step of paired samples learns does not depend on how many micro-batches it is cut into."""

from pathlib import Path

import pytest
import torch
from paired_shards import paired_samples, write_pairs, write_recipe

from d2v_scale import command_line
from d2v_scale.data.loader import StepLoader
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import ds_config, groups
from d2v_scale.pretraining.breakdown import LossBreakdown
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe

V1 = {
    "visible_only: true": "visible_only: false",
    "kind: conv1d, width: 32, kernel: 3, groups: 4, layers: 2": "kind: linear",
    "kind: random, prob: 0.5, clones: 2": "kind: spans, prob: 0.5, length: 3, clones: 1",
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples; of every five one has no image, one no recording, one no text."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), paired_samples(40))


def losses(recipe: Recipe, accumulation: int) -> list[dict[str, float]]:
    """Of two steps in one process: the whole loss, and that of every part."""
    numbers = ds_config.RecipeNumbers(precision="fp32", accumulation=accumulation)
    config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
    topology = groups.single_process()
    student, teacher = build_engines(recipe, config, topology)
    loader = StepLoader(
        recipe.data, recipe.model, recipe.masking(), seed=1, global_batch_size=8, accumulation=accumulation
    )
    found = []
    for step in range(2):
        breakdown = LossBreakdown([f"pairs/{stem}" for stem in recipe.model.stems], torch.device("cpu"))
        batches = next(loader)
        assert len(batches) == accumulation
        _, seen = train_step(
            student, teacher, batches, recipe.objective, Draw(1, step), observe=False, breakdown=breakdown
        )
        found.append({"loss": float(seen.loss)} | {k: float(x) for k, x in breakdown.figures(topology).items()})
    teacher.destroy()
    student.destroy()
    return found


@pytest.mark.parametrize("replaced", [{}, V1], ids=["2.0", "1.0"])
def test_padding_of_a_micro_batch_changed_masks_and_loss_of_paired_samples(
    index: Path, tmp_path: Path, replaced: dict[str, str]
) -> None:
    recipe = command_line.parse(["--recipe", str(write_recipe(tmp_path / "pairs.yaml", index, **replaced))])[0]
    recipe.check(1)
    whole = losses(recipe, 1)
    for accumulation in (2, 4):
        for one, expected in zip(losses(recipe, accumulation), whole, strict=True):
            assert one == pytest.approx(expected, rel=2e-6)
