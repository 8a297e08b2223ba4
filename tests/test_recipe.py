"""Contradictions inside a recipe are refused before any process group is formed."""

import pytest

from d2v_scale import command_line
from d2v_scale.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "world_size", "key"),
    [
        (["--objective.target.top_k_layers", "5"], 1, "objective.target.top_k_layers"),
        (["--objective.masking.clones", "2"], 1, "objective.masking.clones"),
        (["--recipe", "tiny2_text", "--objective.masking.kind", "spans"], 1, "objective.masking.kind"),
        (
            ["--recipe", "tiny2_text", "--objective.masking.kind=bert", "--objective.compat.equalize_masks=true"],
            1,
            "objective.masking.kind",
        ),
        (["--objective.loss.cls_weight", "0.1"], 1, "objective.loss.cls_weight"),
        (["--model.predictor.kind", "conv2d"], 1, "model.predictor.kind"),
        (["--model.vision.patch_size", "5"], 1, "model.vision.patch_size"),
        (["--model.backbone.heads", "5"], 1, "model.backbone.heads"),
        (["--parallel.tensor", "3"], 3, "parallel.tensor"),
        (["--parallel.tensor", "2"], 3, "parallel"),
        (["--global_batch_size", "3"], 4, "global_batch_size"),
        (["--batch_unit", "seconds"], 1, "batch_unit"),
        (["--accumulation", "0"], 1, "accumulation"),
        (["--profile.steps", "9:3"], 1, "profile.steps"),
    ],
)
def test_a_contradiction_names_its_key(arguments, world_size, key):
    recipe, _ = command_line.parse(arguments)
    with pytest.raises(ConfigError) as error:
        recipe.check(world_size)
    assert error.value.key == key


@pytest.mark.parametrize("world_size", range(1, 9))
def test_the_demo_runs_on_one_to_eight_processes(world_size):
    recipe, _ = command_line.parse([])
    recipe.check(world_size)


def test_several_modalities_at_zero3_are_refused_because_old_gradients_would_be_applied_again(tmp_path, monkeypatch):
    from d2v_scale import train

    monkeypatch.setenv("WORLD_SIZE", "1")
    recipe, _ = command_line.parse(["--data.sources", "[{shards: a, modality: vision}]"])
    text, _ = command_line.parse(["--recipe", "d2v1_text_base"])
    recipe.model.text = text.model.text
    train.configure(recipe)
    recipe.deepspeed_config = str(tmp_path / "zero3.json")
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(ConfigError, match="several modalities"):
        train.configure(recipe)
