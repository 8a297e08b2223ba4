"""d2v_scale.interop.teacher_model: which encoder teaches a run, from its first start to its last."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_models
from claimed_runs import CONFIG
from claimed_runs import unlocked as unlocked

from d2v_scale.command_line import Options, parse
from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig
from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.interop.teacher_model import adopt_teacher
from d2v_scale.model.config import ModelConfig
from d2v_scale.parallel import groups
from d2v_scale.recipe import Recipe, to_dict
from d2v_scale.run_files import recipe_file
from d2v_scale.running import run_directory
from d2v_scale.teacher.config import TeacherConfig


def encoder(path: Path, depth: int = 3) -> Path:
    """An exported folder without tensors, which nothing here reads."""
    from safetensors.torch import save_file

    path.mkdir()
    recipe = Recipe(model=tiny_models.model("v2_vision", depth=depth))
    note = {"recipe": json.loads(json.dumps(to_dict(recipe))), "step": 3, "weights": "teacher", "run_dir": str(path)}
    (path / "d2v_scale.json").write_text(json.dumps(note))
    save_file({}, path / "model.safetensors")
    return path


def student_of(checkpoint: Path, own: ModelConfig | None = None) -> Recipe:
    return Recipe(
        model=tiny_models.model("v2_vision"),
        objective=ObjectiveConfig(masking=MaskingConfig(kind="random"), target=tiny_models.target_of("v2_vision")),
        teacher=TeacherConfig(kind="checkpoint", checkpoint=str(checkpoint), model=own),
    )


def begun(run_dir: Path, checkpoint: Path) -> Recipe:
    """The run directory of a student of this encoder, with a record of a step and no checkpoint yet."""
    recipe = student_of(checkpoint)
    start(recipe, Options(run_dir=str(run_dir)))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return recipe


def start(recipe: Recipe, options: Options) -> None:
    """What `train` does with them before it builds anything."""
    adopt_teacher(recipe, options)
    run_directory.claim(recipe, options, CONFIG, groups.single_process())


def commit(run_dir: Path) -> None:
    marker = run_dir / "checkpoints" / "step-00000002" / "COMMITTED"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")


def recorded(run_dir: Path) -> TeacherConfig:
    return parse(["--recipe", str(run_dir / "recipe.yaml")])[0].teacher


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_run_that_trained_keeps_its_teacher(tmp_path: Path, has_checkpoint: bool) -> None:
    """Its recipe named another encoder than the one whose weights it had, and before its first checkpoint it went on
    with the other one."""
    a, b, run_dir = encoder(tmp_path / "a"), encoder(tmp_path / "b"), tmp_path / "run"
    begun(run_dir, a)
    if has_checkpoint:
        commit(run_dir)
    for words in (["--resume", str(run_dir)], ["--recipe", str(run_dir / "recipe.yaml"), "--run_dir", str(run_dir)]):
        recipe, options = parse([*words, "--teacher.checkpoint", str(b)])
        with pytest.raises(ConfigError, match=r"teacher\.checkpoint"):
            start(recipe, options)
    assert recorded(run_dir).checkpoint == str(a)


@pytest.mark.parametrize("fault", ["gone", "damaged", "gone on otherwise"])
def test_a_run_that_goes_on_does_not_look_at_the_encoder_it_began_with(tmp_path: Path, fault: str) -> None:
    source, run_dir = encoder(tmp_path / "a"), tmp_path / "run"
    begun(run_dir, source)
    model = recorded(run_dir).model
    assert model is not None
    commit(run_dir)
    if fault == "gone on otherwise":
        (source / "d2v_scale.json").unlink()
        (source / "model.safetensors").unlink()
        source.rmdir()
        encoder(source, depth=5)
    elif fault == "gone":
        source.rename(tmp_path / "elsewhere")
    else:
        (source / "d2v_scale.json").write_text("{")
    for recipe, options in (
        (student_of(source), Options(run_dir=str(run_dir))),
        parse(["--resume", str(run_dir)]),
    ):
        start(recipe, options)
        assert recipe.teacher.model == model
    assert recorded(run_dir).model == model


def test_a_link_to_the_encoder_is_the_encoder(tmp_path: Path) -> None:
    source, run_dir = encoder(tmp_path / "a"), tmp_path / "run"
    begun(run_dir, source)
    commit(run_dir)
    (tmp_path / "link").symlink_to(source)
    start(student_of(tmp_path / "link"), Options(run_dir=str(run_dir)))
    assert recorded(run_dir).checkpoint == str(source)


def test_before_its_first_checkpoint_a_run_needs_its_encoder(tmp_path: Path) -> None:
    source, run_dir = encoder(tmp_path / "a"), tmp_path / "run"
    begun(run_dir, source)
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        start(*parse(["--resume", str(run_dir)]))


def test_a_run_with_another_kind_of_teacher_does_not_go_on_with_an_encoder(tmp_path: Path) -> None:
    source, run_dir = encoder(tmp_path / "a"), tmp_path / "run"
    recipe = dataclasses.replace(student_of(source), teacher=TeacherConfig(kind="frozen"))
    start(recipe, Options(run_dir=str(run_dir)))
    commit(run_dir)
    changed = Options(run_dir=str(run_dir), allow_recipe_change=True)
    with pytest.raises(ConfigError) as caught:
        start(student_of(source), changed)
    assert caught.value.key == "teacher.kind"


def test_a_model_that_the_encoder_does_not_have_is_refused(tmp_path: Path) -> None:
    """It was overwritten without a word."""
    source = encoder(tmp_path / "a")
    asked = tmp_path / "asked.yaml"
    asked.write_text(recipe_file.dump(student_of(source)))
    recipe, options = parse(["--recipe", str(asked), "--teacher.model.backbone.depth", "6"])
    with pytest.raises(ConfigError) as caught:
        adopt_teacher(recipe, options)
    assert caught.value.key == "teacher.model.backbone.depth"
    assert "is 6, but 3" in str(caught.value)
    same = student_of(source, tiny_models.model("v2_vision"))
    assert same.teacher.model is not None
    same.teacher.model.activation_checkpointing = True
    adopt_teacher(same, Options())
    assert same.teacher.model == tiny_models.model("v2_vision")


def test_the_usual_teacher_of_a_named_recipe_is_not_asked_for(tmp_path: Path) -> None:
    recipe, options = parse(["--recipe", "demo_half"])
    usual = recipe.teacher.model
    assert usual is not None
    deeper = encoder(tmp_path / "a", depth=usual.backbone.depth + 1)
    recipe.teacher.checkpoint = str(deeper)
    recipe.data.vision.mean, recipe.data.vision.std = Recipe().data.vision.mean, Recipe().data.vision.std
    adopt_teacher(recipe, options)
    assert recipe.teacher.model is not None
    assert recipe.teacher.model.backbone.depth == usual.backbone.depth + 1
