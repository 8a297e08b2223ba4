"""Images that are no squares, from shards to a continued run, its pictures, probes and features."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from launch import ROOT, run_ranks
from small_shards import image_samples

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.planning.flops import cost_of, lengths_of
from d2v_scale.recipe import Recipe
from d2v_scale.run_files import recipe_file
from d2v_scale.shards.writing import write_set

SMALL = [
    "model.vision.image_size=[32, 48]",
    "model.backbone.depth=2",
    "model.backbone.width=32",
    "model.backbone.ffn=64",
    "objective.target.top_k_layers=2",
    "data.workers=0",
    "tracking.log_every=1",
    "tracking.plot_every=3",
    "evaluation.every=3",
    "checkpoint.every=2",
    "checkpoint.keep_last=9",
    "global_batch_size=8",
    "precision=fp32",
]
RECIPES = {
    "tiny1_vision": ["model.vision.positions=relative", "model.vision.relative_std=0.1"],
    "tiny2_vision": ["model.predictor.width=32", "model.predictor.groups=4"],
}


def parsed(name: str, *keys: str) -> tuple[Recipe, command_line.Options]:
    return command_line.parse([f"--{key}" for key in (f"recipe={name}", *SMALL, *RECIPES[name], *keys)])


def launch(name: str, **keys: object) -> None:
    given = {**keys, "deepspeed_config": ROOT / "ds_configs" / "zero1.json"}
    options = [text for key, value in given.items() for text in (f"--{key.replace('__', '.')}", str(value))]
    small = [f"--{key}" for key in (*SMALL, *RECIPES[name])] if "resume" not in keys else []
    run_ranks(1, ROOT / "d2v_scale" / "train.py", *options, *small)


def losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        samples = image_samples(32, side=40)
        write_set(tmp_path / "shards" / split, split, "image", samples, per_shard=16, classes=["a", "b", "c"])
    return tmp_path / "shards"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny2_vision", "tiny1_vision"])
def test_wide_images_train_resume_and_are_looked_at(
    name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_of_one: None
) -> None:
    keys = {"recipe": name, "data": shards / "train", "evaluation__train": shards / "train"}
    keys |= {"evaluation__test": shards / "test"}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    launch(name, **keys, run_dir=straight, stop_at=5)
    launch(name, **keys, run_dir=resumed, stop_at=2)
    launch(name, resume=resumed, stop_at=5)
    assert len(losses(straight)) == 5
    assert losses(resumed) == losses(straight)
    drawn = {path.name for path in (straight / "plots").glob("*.png")}
    assert {"masks.png", "pca.png", "neighbours.png"} <= drawn

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    features = tmp_path / "features"
    for tool, *arguments in (
        ("probe", straight, "--data", shards / "train", "--test", shards / "test", "--k", 3),
        ("extract", straight, shards / "test", features, "--pool", "none", "--format", "shards"),
    ):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        assert importlib.import_module(tool).main() == 0
    assert list(features.glob("*.tar"))


def test_an_encoder_of_wide_images_is_fine_tuned(shards: Path, tmp_path: Path) -> None:
    launch("tiny2_vision", recipe="tiny2_vision", data=shards / "train", run_dir=tmp_path / "encoder", stop_at=1)
    keys = {"recipe": "finetune_digits", "init_from": tmp_path / "encoder", "data": shards / "train", "stop_at": 2}
    options = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    options += ["--evaluation.test", str(shards / "test"), "--run_dir", str(tmp_path / "tuned"), "--data.workers=0"]
    options += ["--task.image.mixup=0.8", "--task.image.cutmix=1", "--task.image.erase=0.5"]
    run_ranks(1, ROOT / "d2v_scale" / "train.py", *options, "--task.image.rand_augment=9", "--global_batch_size=8")
    recipe, _ = command_line.parse(["--recipe", str(tmp_path / "tuned" / "recipe.yaml")])
    assert recipe.model.vision is not None
    assert recipe.model.vision.image_size == (32, 48)


def test_a_recipe_of_wide_images_is_read_back_and_a_square_is_one_number(tmp_path: Path) -> None:
    recipe, _ = parsed("tiny2_vision")
    (tmp_path / "recipe.yaml").write_text(recipe_file.dump(recipe))
    assert command_line.parse(["--recipe", str(tmp_path / "recipe.yaml")])[0] == recipe
    assert recipe.model.vision is not None
    assert recipe.model.vision.image_size == (32, 48)
    square, _ = parsed("tiny2_vision", "model.vision.image_size=[32, 32]")
    assert square == parsed("tiny2_vision", "model.vision.image_size=32")[0]


@pytest.mark.parametrize(
    ("size", "key"),
    [
        ("[32, 50]", "model.vision.patch_size"),
        ("[0, 48]", "model.vision.image_size"),
        ("[-32, 48]", "model.vision.image_size"),
        ("[32, 48, 3]", "model.vision.image_size"),
        ("[true, 48]", "model.vision.image_size"),
        ("32.5", "model.vision.image_size"),
    ],
)
def test_sizes_that_are_none_are_refused_by_name(size: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed("tiny2_vision", f"model.vision.image_size={size}")[0].check(1)
    assert error.value.key == key


def test_masks_that_do_not_fit_a_wide_grid_are_refused_before_anything_is_built() -> None:
    recipe, _ = parsed("tiny1_vision", "model.vision.image_size=[8, 48]", "objective.masking.target_count=24")
    with pytest.raises(ConfigError, match="1 to 23"):
        recipe.check(1)


@pytest.mark.parametrize("name", list(RECIPES))
def test_costs_are_those_of_as_many_patches(name: str) -> None:
    """A grid of 8 x 12 costs what any grid of 96 does, but for what an even kernel adds at its edges."""
    wide, tall = (parsed(name, f"model.vision.image_size={size}")[0] for size in ("[32, 48]", "[48, 32]"))
    assert lengths_of(wide, "vision").grid == (8, 12)
    assert lengths_of(wide, "vision").positions == 96
    assert cost_of(wide, "vision").total == pytest.approx(cost_of(tall, "vision").total, rel=0.02)
    square = parsed(name, "model.vision.image_size=32")[0]
    assert cost_of(wide, "vision").layers[0].forward == 1.5 * cost_of(square, "vision").layers[0].forward
