"""What the planner lists, training starts."""

from pathlib import Path

import pytest

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.model.stem_config import SpeechStem
from d2v_scale.planning import hardware, legal
from d2v_scale.planning.costs import assumed
from d2v_scale.planning.job import ModelSizes
from d2v_scale.planning.search import Cluster, Search, search
from d2v_scale.recipe import Recipe
from d2v_scale.train import configure

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def found_for(recipe: Recipe) -> Search:
    cluster = Cluster(nodes=1, devices_per_node=4, device=hardware.H100, costs=assumed(hardware.H100, 0.4))
    return search(recipe, cluster, ModelSizes.of(recipe), CONFIGS)


@pytest.mark.usefixtures("world_of_one")
def test_every_layout_the_planner_lists_is_one_that_training_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    recipe, _ = command_line.parse(["--recipe=tiny2_vision"])
    assert [option for option in found_for(recipe).fitting if option.job.stage == 3]
    recipe.model.speech = SpeechStem()
    recipe.model.predictor.kind = "conv"  # of as many axes as each stem has
    recipe.data.read_from("vision=v/*.tar,speech=s/*.tar", recipe.model.modalities)
    found = found_for(recipe)
    assert len(found.fitting) > 3
    assert [option for option in found.fitting if option.job.stage == 3]
    for option in found.fitting + found.too_large:
        option.job.recipe.deepspeed_config = str(CONFIGS / option.deepspeed_config)
        configure(option.job.recipe)


def test_an_odd_width_cannot_cross_stages() -> None:
    recipe, _ = command_line.parse(["--recipe=demo_vision", "--parallel.pipeline=2"])
    recipe.model.backbone.width = 66
    recipe.model.backbone.heads = 1
    legal.deepspeed_config(recipe, {"zero_optimization": {"stage": 1}}, 2, auto="bf16")
    recipe.model.backbone.width = 65
    with pytest.raises(ConfigError, match="odd"):
        legal.deepspeed_config(recipe, {"zero_optimization": {"stage": 1}}, 2, auto="bf16")
