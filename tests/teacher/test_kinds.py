"""Teachers that do not follow the student: a frozen one, and the encoder of another run."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from target_engines import saved

from d2v_scale.checkpoint import Checkpoint, find, training
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.command_line import Options, parse
from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.errors import CheckpointError, ConfigError, DataError
from d2v_scale.interop import exporting
from d2v_scale.interop.encoder_source import EncoderSource, open_encoder
from d2v_scale.interop.teacher_model import adopt_teacher
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel import ds_config, groups
from d2v_scale.planning import flops
from d2v_scale.pretraining import program
from d2v_scale.pretraining.engines import build_engines, read_encoder
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe
from d2v_scale.teacher.config import TeacherConfig

pytestmark = pytest.mark.usefixtures("world_of_one")


def recipe_of(name: str, teacher: TeacherConfig) -> Recipe:
    masks = MaskingConfig(kind="random", clones=2 if name.startswith("v2") else 1)
    target = dataclasses.replace(tiny_models.target_of(name), top_k_layers=2)
    return Recipe(
        model=tiny_models.model(name), objective=ObjectiveConfig(masking=masks, target=target), teacher=teacher
    )


def engines(recipe: Recipe, stage: int = 1, precision: Any = "fp32") -> tuple[Any, Any]:
    numbers = ds_config.RecipeNumbers(precision=precision)
    config = ds_config.resolve({"zero_optimization": {"stage": stage}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, groups.single_process())
    student.module.train()
    return student, teacher


def larger(name: str) -> ModelConfig:
    return tiny_models.model(name, width=48, ffn=80, depth=5)


def encoder(model: ModelConfig, seed: int = 7) -> Teacher:
    module = Teacher(model, None, TeacherParts())
    initialize(module, seed)
    return module


def values(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def source_of(module: torch.nn.Module, recipe: Recipe) -> EncoderSource:
    return EncoderSource(Path("other"), recipe, values(module).get)


def take(student: Any, teacher: Any, recipe: Recipe, name: str, steps: range) -> None:
    clones = recipe.objective.masking.clones
    for step in steps:
        batch = tiny_models.batch(name, 2, clones, seed=step)
        train_step(student, teacher, [batch], recipe.objective, Draw(1, step), observe=True)


@pytest.mark.parametrize(("stage", "precision", "placement"), [(1, "fp32", "device"), (3, "bf16", "cpu")])
@pytest.mark.parametrize("name", ["v1_vision", "v2_speech"])
def test_a_frozen_teacher_keeps_every_bit_of_the_students_first_weights(
    name: str, stage: int, precision: str, placement: Any
) -> None:
    """Those of the stem, too, which a teacher that follows shares with its student (2.0 speech)."""
    recipe = recipe_of(name, TeacherConfig(kind="frozen", placement=placement))
    student, teacher = engines(recipe, stage, precision)
    initial = Student(recipe.model)
    initialize(initial, recipe.seed)
    first = values(initial)
    before = {shard.name: shard.values.clone() for shard in teacher.shards()}
    weights = {shard.name: shard.weight.clone() for shard in student.shards()}
    take(student, teacher, recipe, name, range(3))
    for shard in teacher.shards():
        assert torch.equal(shard.values, before[shard.name])
        assert precision == "bf16" or torch.equal(shard.values, first[shard.name].flatten())
    assert {"features"} <= {part for name in before for part in name.split(".")}
    assert not all(torch.equal(shard.weight, weights[shard.name]) for shard in student.shards())
    assert teacher.completed_updates == student.completed_updates == 3
    assert teacher.health() == {}


def test_a_teacher_that_follows_moves_where_a_frozen_one_does_not() -> None:
    moved = []
    for kind in ("ema", "frozen"):
        recipe = recipe_of("v2_vision", TeacherConfig(kind=kind))  # type: ignore[arg-type]
        student, teacher = engines(recipe)
        before = {shard.name: shard.values.clone() for shard in teacher.shards()}
        take(student, teacher, recipe, "v2_vision", range(2))
        moved.append(any(not torch.equal(shard.values, before[shard.name]) for shard in teacher.shards()))
    assert moved == [True, False]


@pytest.mark.parametrize("name", ["v1_vision", "v2_speech", "v2_text"])
def test_targets_are_those_of_the_other_encoder_and_its_weights_stay(name: str) -> None:
    recipe = recipe_of(name, TeacherConfig(kind="checkpoint", model=larger(name)))
    student, teacher = engines(recipe)
    other = encoder(larger(name))
    read_encoder(teacher, source_of(other, recipe))
    batch = tiny_models.batch(name, 2, recipe.objective.masking.clones)
    alone = Teacher(larger(name), recipe.targets(), TeacherParts())
    alone.load_state_dict(other.state_dict())
    made = teacher.make(batch, None)[0].targets_btd
    assert torch.equal(made, alone(batch))
    assert made.shape[-1] == 48 != recipe.model.backbone.width
    before = values(teacher.module)
    take(student, teacher, recipe, name, range(2))
    assert all(torch.equal(x, before[key]) for key, x in values(teacher.module).items())


def test_the_student_is_what_is_evaluated_where_no_teacher_follows_it() -> None:
    recipe = recipe_of("v2_vision", TeacherConfig(kind="frozen"))
    student, teacher = engines(recipe)
    take(student, teacher, recipe, "v2_vision", range(3))
    batch = tiny_models.batch("v2_vision", 2)
    of_student = encoder(recipe.model)
    ours = values(student.module)
    of_student.load_state_dict({name: ours[name] for name in values(of_student)}, strict=False)
    found, wanted = teacher.encoder_features(batch, None, [0, -1]), of_student.features(batch, None, [0, -1])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert student.module.training
    assert not torch.equal(found[1], teacher.features(batch, None, [-1])[0])


def run_of(root: Path, name: str, kind: Any, own: ModelConfig | None = None) -> tuple[Recipe, Any, Any, Checkpoint]:
    """Two steps with this teacher, and their checkpoint."""
    recipe = recipe_of(name, TeacherConfig(kind=kind, model=own))
    student, teacher = engines(recipe)
    if own is not None:
        read_encoder(teacher, source_of(encoder(own), recipe))
    take(student, teacher, recipe, name, range(2))
    return recipe, student, teacher, saved(root, student, teacher, recipe)


@pytest.mark.parametrize("kind", ["frozen", "checkpoint"])
def test_a_run_goes_on_bit_for_bit_without_the_file_of_its_teacher(tmp_path: Path, kind: str) -> None:
    own = larger("v2_vision") if kind == "checkpoint" else None
    recipe, student, teacher, checkpoint = run_of(tmp_path, "v2_vision", kind, own)
    again, follower = engines(recipe, stage=3)
    training.restore(checkpoint, again, follower)
    for one, its in ((student, teacher), (again, follower)):
        take(one, its, recipe, "v2_vision", range(2, 4))
    first, second = ({s.name: s.weight for s in one.shards()} for one in (student, again))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    kept, read = ({s.name: s.values for s in its.shards()} for its in (teacher, follower))
    assert all(torch.equal(x, read[name]) for name, x in kept.items())


def test_readers_of_a_run_take_the_student_where_no_teacher_followed_it(tmp_path: Path) -> None:
    *_, checkpoint = run_of(tmp_path, "v2_vision", "frozen")
    source = open_encoder(checkpoint.path, "teacher")
    name = "blocks.0.ffn.fc1.weight"
    found = source.read(name)
    assert source.weights == "student"
    assert found is not None
    assert torch.equal(found, checkpoint.tensor("student", name))
    assert not torch.equal(found, checkpoint.tensor("teacher", name))


def test_an_exported_student_is_not_opened_as_a_teacher(tmp_path: Path) -> None:
    recipe, *_, checkpoint = run_of(tmp_path / "run", "v2_vision", "frozen")
    exporting.export_safetensors(checkpoint, recipe, tmp_path / "out", "student")
    assert open_encoder(tmp_path / "out").weights == "student"


def test_a_teacher_that_follows_begins_as_the_student_of_a_run_whose_teacher_did_not(tmp_path: Path) -> None:
    deeper = tiny_models.model("v2_vision", depth=5)
    *_, checkpoint = run_of(tmp_path, "v2_vision", "checkpoint", deeper)
    recipe = recipe_of("v2_vision", TeacherConfig())
    student, teacher = engines(recipe)
    training.restore_weights(checkpoint, student, teacher)
    for shard in teacher.shards():
        assert torch.equal(shard.values, checkpoint.tensor("student", shard.name).flatten())


def test_a_frozen_teacher_begins_with_what_the_one_before_it_averaged_and_shared(tmp_path: Path) -> None:
    *_, checkpoint = run_of(tmp_path, "v2_speech", "ema")
    recipe = recipe_of("v2_speech", TeacherConfig(kind="frozen"))
    student, teacher = engines(recipe)
    training.restore_weights(checkpoint, student, teacher)
    averaged = set(checkpoint.names("teacher"))
    kinds = {shard.name: "teacher" if shard.name in averaged else "student" for shard in teacher.shards()}
    assert set(kinds.values()) == {"teacher", "student"}
    for shard in teacher.shards():
        assert torch.equal(shard.values, checkpoint.tensor(kinds[shard.name], shard.name).flatten())


def test_flops_are_those_of_the_other_encoder() -> None:
    plain = recipe_of("v2_vision", TeacherConfig())
    same = recipe_of("v2_vision", TeacherConfig(kind="checkpoint", model=tiny_models.model("v2_vision")))
    twice = recipe_of("v2_vision", TeacherConfig(kind="checkpoint", model=tiny_models.model("v2_vision", depth=6)))
    of_plain, of_same, of_twice = (flops.cost_of(one, "vision") for one in (plain, same, twice))
    assert of_same.total == pytest.approx(of_plain.total)
    assert of_same.student_only == of_twice.student_only == of_plain.student_only
    prenet = 1
    assert of_twice.teacher == pytest.approx(of_plain.teacher * (6 + prenet) / (3 + prenet))


BAD = {
    "teacher.checkpoint": TeacherConfig(kind="checkpoint"),
    "teacher.model": TeacherConfig(model=larger("v1_vision")),
}


@pytest.mark.parametrize("key", BAD)
def test_a_kind_without_what_it_needs_is_refused(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of("v1_vision", BAD[key]).check(1)
    assert caught.value.key == key


def beside(name: str, model: ModelConfig, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe_of(name, TeacherConfig(kind="checkpoint", model=model)), **changes)


def test_an_encoder_that_does_not_fit_is_refused_with_key_and_remedy() -> None:
    coarse = larger("v2_vision")
    assert coarse.vision is not None
    coarse.vision.patch_size *= 2
    longer = larger("v2_text")
    assert longer.text is not None
    longer.text.max_positions *= 2
    found = {}
    for what, recipe, world in (
        ("patches", beside("v2_vision", coarse), 1),
        ("stem", beside("v2_vision", larger("v2_speech")), 1),
        ("pipeline", beside("v2_vision", larger("v2_vision"), parallel=groups.ParallelConfig(pipeline=2)), 2),
        ("tensor", beside("v2_vision", tiny_models.model("v2_vision", width=30, heads=3)), 2),
        ("parts", beside("v2_vision", larger("v2_vision"), teacher_parts=TeacherParts(shared=["stems"])), 1),
        ("texts", beside("v2_text", longer), 1),
    ):
        if what == "tensor":
            recipe.parallel = groups.ParallelConfig(tensor=2)
        with pytest.raises(ConfigError, match=r"\. [A-Z]|\.$") as caught:
            recipe.check(world)
        found[what] = caught.value.key
    assert found == {
        "patches": "model.vision.patch_size",
        "stem": "teacher.checkpoint",
        "pipeline": "parallel.pipeline",
        "tensor": "parallel.tensor",
        "parts": "teacher_parts",
        "texts": "model.text.max_positions",
    }


def test_a_width_that_needs_a_projection_where_there_is_none_is_refused() -> None:
    """The CLS term compares the encoder's own output with targets, without a head."""
    recipe = beside("v2_vision", larger("v2_vision"))
    recipe.objective.loss.cls_weight = 0.5
    with pytest.raises(ConfigError, match="targets of width 48, and has no projection") as caught:
        recipe.check(1)
    assert caught.value.key == "objective.loss.cls_weight"


def test_the_model_is_entered_from_the_checkpoint(tmp_path: Path) -> None:
    *_, checkpoint = run_of(tmp_path, "v2_vision", "ema")
    recipe = recipe_of("v2_vision", TeacherConfig(kind="checkpoint", checkpoint=str(checkpoint.path)))
    adopt_teacher(recipe, Options())
    assert recipe.teacher.model == tiny_models.model("v2_vision")
    recipe.check(1)
    _, teacher = engines(recipe)
    read_encoder(teacher, open_encoder(checkpoint.path))
    for shard in teacher.shards():
        kind = "teacher" if shard.name in checkpoint.names("teacher") else "student"
        assert torch.equal(shard.values, checkpoint.tensor(kind, shard.name).flatten())
    with pytest.raises(CheckpointError, match="of the teacher has the shape"):
        read_encoder(teacher, source_of(encoder(larger("v2_vision")), recipe))
    recipe.data.vision.mean = [0.1, 0.1, 0.1]
    with pytest.raises(ConfigError) as caught:
        adopt_teacher(recipe, Options())
    assert caught.value.key == "data.vision.mean"


def test_a_checkpoint_that_is_not_there_is_refused_and_so_is_a_reset(tmp_path: Path) -> None:
    missing = recipe_of("v2_vision", TeacherConfig(kind="checkpoint", checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match="does not exist"):
        adopt_teacher(missing, Options())
    with pytest.raises(ConfigError, match="reset_teacher"):
        adopt_teacher(missing, Options(init_from="there", reset_teacher=True))


def load_teacher(recipe: Recipe, of_texts: str | None = None) -> dict[str, torch.Tensor]:
    """What a run of this recipe gives its teacher, on texts of a tokenizer with this checksum."""
    _, teacher = engines(recipe)
    loader = SimpleNamespace(tokenizer_sha256=lambda: of_texts)
    program._load_teacher(SimpleNamespace(recipe=recipe, teacher=teacher, loader=loader))  # type: ignore[arg-type]
    return {shard.name: shard.values for shard in teacher.shards()}


def test_all_ranks_read_the_checkpoint_that_rank_0_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each took the newest that it saw itself of a run that still wrote some: one teacher was made of two."""
    recipe, student, teacher, first = run_of(tmp_path, "v2_vision", "ema")
    weights = {name: first.tensor("teacher", name) for name in first.names("teacher")}
    take(student, teacher, recipe, "v2_vision", range(2, 4))
    writer = CheckpointWriter.create(tmp_path)
    writer.save(9, training.pieces(student, teacher), training.state(student, teacher), first.extra)
    assert writer.finish()
    monkeypatch.setattr(find, "_of_rank_0", lambda _: [first.path])
    found = load_teacher(
        recipe_of("v2_vision", TeacherConfig(kind="checkpoint", checkpoint=str(tmp_path), model=recipe.model))
    )
    assert all(torch.equal(found[name], values.flatten()) for name, values in weights.items())


def test_a_teacher_of_texts_of_another_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts only the number of pieces was compared."""
    own = larger("v2_text")
    recipe = recipe_of("v2_text", TeacherConfig(kind="checkpoint", checkpoint="other", model=own))
    recipe.data.read_from("texts.tar", ["text"])
    source = dataclasses.replace(source_of(encoder(own), recipe), tokenizer_sha256="a" * 64)
    monkeypatch.setattr(program, "open_encoder", lambda _path, **_: source)
    load_teacher(recipe, "a" * 64)
    with pytest.raises(DataError, match="another tokenizer"):
        load_teacher(recipe, "b" * 64)


def test_the_recipes_of_two_stages_and_of_distillation_say_who_teaches() -> None:
    kinds = {name: parse(["--recipe", name])[0] for name in ("demo_salt_pixels", "demo_salt", "demo_half")}
    for recipe in kinds.values():
        recipe.check(1)
    assert [recipe.teacher.kind for recipe in kinds.values()] == ["frozen", "checkpoint", "checkpoint"]
    assert kinds["demo_salt"].teacher.model == kinds["demo_salt_pixels"].model
    half, whole = kinds["demo_half"].model.backbone, kinds["demo_half"].teacher.model
    assert whole is not None
    assert whole == parse(["--recipe", "demo_vision"])[0].model
    assert 2 * half.width == whole.backbone.width
    assert TargetConfig() != kinds["demo_salt_pixels"].objective.target
