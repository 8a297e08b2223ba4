"""Settings that one stem has for itself: masks, targets, loss, predictor, prenet, batch."""

import dataclasses
import math
from typing import Any

import pytest
import tiny_models
import torch

from d2v_scale.command_line import parse
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data2vec import own
from d2v_scale.data2vec.config import HealthConfig, LossConfig, MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.errors import ConfigError
from d2v_scale.model.config import Predictor
from d2v_scale.model.stem_config import OwnPredictor
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student
from d2v_scale.optim import set_rates
from d2v_scale.parallel import ds_config, groups
from d2v_scale.planning import flops, stages
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.health import HealthMonitor
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe

TEXT = "{modality: text, shards: t"
JOINT = ("d2v2_joint_base", "d2v2_joint_base_shared_decoder", "d2v2_joint_large")


@pytest.mark.parametrize(
    ("overrides", "base"),
    [
        (own.OwnMasking, MaskingConfig),
        (own.OwnTarget, TargetConfig),
        (own.OwnLoss, LossConfig),
        (own.OwnHealth, HealthConfig),
        (OwnPredictor, Predictor),
    ],
)
def test_every_setting_can_be_a_stems_own(overrides: type, base: type) -> None:
    """All of a predictor's but whether it is shared, which is not one stem's to say."""
    names = {field.name for field in dataclasses.fields(base)} - {"shared"}
    assert {field.name for field in dataclasses.fields(overrides)} == names
    assert all(field.default is None for field in dataclasses.fields(overrides))


def test_a_stem_has_its_own_values_and_inherits_the_rest() -> None:
    objective = ObjectiveConfig(masking=MaskingConfig(kind="random", prob=0.5, clones=4), loss=LossConfig(beta=1.0))
    objective.vision = own.OwnObjective(masking=own.OwnMasking(prob=0.8), loss=own.OwnLoss(weight=2.0))
    of_images, of_texts = objective.of("vision"), objective.of("text")
    assert of_images.masking == MaskingConfig(kind="random", prob=0.8, clones=4)
    assert of_images.loss == LossConfig(beta=1.0, weight=2.0)
    assert of_texts.masking == objective.masking
    assert objective.key("vision", "objective.masking.prob") == "objective.vision.masking.prob"
    assert objective.key("vision", "objective.masking.kind") == "objective.masking.kind"


def test_the_nearer_choice_of_layers_counts() -> None:
    objective = ObjectiveConfig(target=TargetConfig(layers=[0, 2]))
    objective.vision = own.OwnObjective(target=own.OwnTarget(top_k_layers=1))
    objective.text = own.OwnObjective(target=own.OwnTarget(layers=[1]))
    assert objective.of("vision").target == TargetConfig(top_k_layers=1)
    assert objective.of("text").target == TargetConfig(layers=[1])
    assert objective.of("speech").target == objective.target


@pytest.mark.parametrize("name", ["v2_vision", "v2_text"])
def test_a_stems_own_values_train_as_those_of_all_do(name: str) -> None:
    """One model written in two ways: losses bitwise equal, and not those of what was overridden."""
    modality, model = tiny_models.modality_of(name), tiny_models.model(name)
    objective = ObjectiveConfig(
        masking=MaskingConfig(clones=2), target=tiny_models.target_of(name), loss=LossConfig(beta=2.0)
    )
    plain = dataclasses.replace(model, predictor=dataclasses.replace(model.predictor, layers=1))
    twice = dataclasses.replace(objective, loss=LossConfig(beta=0.0), target=TargetConfig(top_k_layers=1))
    section = own.OwnObjective(loss=own.OwnLoss(beta=2.0), target=own.OwnTarget(**dataclasses.asdict(objective.target)))
    setattr(twice, modality, section)
    stem = dataclasses.replace(model.stems[modality], predictor=OwnPredictor(layers=model.predictor.layers))
    assert losses(Recipe(model=dataclasses.replace(plain, **{modality: stem}), objective=twice), name) == losses(
        Recipe(model=model, objective=objective), name
    )
    assert losses(Recipe(model=plain, objective=twice), name) != losses(Recipe(model=model, objective=objective), name)


def losses(recipe: Recipe, *names: str) -> list[float]:
    """Of two steps of each stem in turn."""
    recipe.optim.lr = 1e-2
    numbers = ds_config.RecipeNumbers(precision="fp32", accumulation=1)
    config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, groups.single_process())
    found = []
    for step in range(2):
        for name in names:
            clones = recipe.objective.of(tiny_models.modality_of(name)).masking.clones
            batch = tiny_models.batch(name, 2, clones, seed=step)
            result, seen = train_step(student, teacher, [batch], recipe.objective, Draw(1, step), observe=False)
            assert result.applied
            assert float(seen.samples) == 2
            found.append(float(seen.loss))
    teacher.destroy()
    student.destroy()
    return found


@pytest.mark.parametrize("predictor", [{}, {"shared": True}])
def test_stems_that_differ_in_everything_train_together(predictor: dict[str, Any]) -> None:
    recipe = Recipe(model=tiny_models.joint(**predictor), objective=ObjectiveConfig(target=tiny_models.TAPS))
    recipe.objective.vision = own.OwnObjective(masking=own.OwnMasking(clones=4), target=own.OwnTarget(top_k_layers=1))
    recipe.objective.text = own.OwnObjective(loss=own.OwnLoss(beta=1.0, weight=0.5))
    found = losses(recipe, "v2_vision", "v2_speech", "v2_text")
    assert all(map(math.isfinite, found))
    doubled = dataclasses.replace(recipe.objective, text=own.OwnObjective(loss=own.OwnLoss(beta=1.0, weight=1.0)))
    again = losses(dataclasses.replace(recipe, objective=doubled), "v2_vision", "v2_speech", "v2_text")
    assert again[:2] == found[:2]
    assert again[2] == pytest.approx(2 * found[2], rel=1e-6)


def test_a_stem_whose_rate_is_nothing_stays_and_the_blocks_learn() -> None:
    recipe = Recipe(model=tiny_models.model("v2_vision"), objective=ObjectiveConfig(target=tiny_models.TAPS))
    recipe.optim.weight_decay, recipe.optim.lr_scale = 0.1, {"vision": 0.0}
    numbers = ds_config.RecipeNumbers(precision="fp32", accumulation=1)
    config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, groups.single_process())
    before = {name: p.detach().clone() for name, p in student.module.named_parameters()}
    set_rates(student.optimizer, recipe.optim, 1)
    batch = tiny_models.batch("v2_vision", 2, 1)
    assert train_step(student, teacher, [batch], recipe.objective, Draw(1, 0), observe=False)[0].applied
    moved = {name for name, p in student.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("blocks.")}
    teacher.destroy()
    student.destroy()


def test_a_rate_for_a_stem_that_is_not_there_is_refused() -> None:
    recipe, _ = parse(["--recipe", "demo_vision", "--optim.lr_scale", "{smell: 0.5}"])
    with pytest.raises(ConfigError, match="no stem smell") as error:
        recipe.check(1)
    assert error.value.key == "optim.lr_scale.smell"


def test_costs_and_stages_know_what_is_a_stems_own() -> None:
    recipe = Recipe(model=tiny_models.joint(), objective=ObjectiveConfig(target=tiny_models.TAPS))
    recipe.objective.masking = MaskingConfig(kind="random", prob=0.5)
    recipe.objective.vision = own.OwnObjective(masking=own.OwnMasking(clones=4, prob=0.75))
    lengths = {name: flops.lengths_of(recipe, name) for name in recipe.model.modalities}
    assert [lengths[name].clones for name in lengths] == [4, 1, 1]
    assert lengths["vision"].kept == 4
    for name in recipe.model.modalities:
        assert flops.cost_of(recipe, name) == flops.cost_of(recipe.of(name), name)
    assert stages.stage_blocks(recipe, 2, 1).blocks


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("name", JOINT)
def test_the_joint_recipes_have_the_parameters_that_their_figures_say(name: str) -> None:
    """A pre-norm block of width D and hidden width F has (4 D + 4) D in attention, (2 F + 1) D + F in its FFN and 4 D
    in two norms: 7,087,872 at 768 and 3072, 12,596,224 at 1024 and 4096. There are `depth` shared ones and three times
    `prenet` of their own; the final norm has 2 D.

    Stems: patches 3 * 16^2 * D + D and one CLS token; seven convolutions of 512 channels (4,199,424 weights) with seven
    norms and one after them (8 * 2 * 512), the projection 512 D + D, five positional convolutions of kernel 19 in 16
    groups (D (D / 16) 19 + D each) and a scale a head; tables 50,265 D and (512 + 2) D and a norm.

    Decoders, of width W, kernel k (k^2 in two dimensions), g groups: first W (D / g) k + W, then W (W / g) k + W for
    every further layer, a projection W D + D, and for images a norm of 2 W.
    """
    recipe, _ = parse(["--recipe", name, "--data", "speech=s.tar,vision=v.tar,text=t.tar"])
    recipe.check(64)
    large, shared = name.endswith("large"), name.endswith("shared_decoder")
    d, f, heads, depth, prenet = (1024, 4096, 16, 16, 8) if large else (768, 3072, 12, 8, 4)
    block = (4 * d + 4) * d + (2 * f + 1) * d + f + 4 * d
    assert block == (12_596_224 if large else 7_087_872)
    convolutions = 512 * 10 + 4 * 512 * 512 * 3 + 2 * 512 * 512 * 2
    speech = convolutions + 8 * 2 * 512 + 512 * d + d + 5 * (d * (d // 16) * 19 + d) + heads
    stems = (3 * 16**2 * d + d + d) + speech + (50_265 * d + 514 * d + 2 * d)

    def decoder(w: int, taps: int, g: int, layers: int) -> int:
        return w * (d // g) * taps + w + (layers - 1) * (w * (w // g) * taps + w) + w * d + d

    text = decoder(d, 9, 1, 5)
    decoders = text if shared else text + decoder(512, 9, 16, 6) + 2 * 512 + decoder(384, 7, 16, 4)
    with torch.device("meta"):
        student = Student(recipe.model)
    total = sum(parameter.numel() for parameter in student.parameters())
    assert total == (depth + 3 * prenet) * block + 2 * d + stems + decoders


@pytest.mark.parametrize("name", JOINT)
def test_a_joint_recipe_mixes_and_masks_as_published(name: str) -> None:
    recipe, _ = parse(["--recipe", name, "--data", "speech=s.tar,vision=v.tar,text=t.tar"])
    assert [(s.modality, s.shards, s.repeat) for s in recipe.data.sources] == [
        *(("speech", "s.tar", 20), ("vision", "v.tar", 5), ("text", "t.tar", 1))
    ]
    masks = recipe.masking()
    assert {m: (masks[m].prob, masks[m].length, masks[m].clones, masks[m].inverse) for m in masks} == {
        "speech": (0.7, 5, 8, False),
        "vision": (0.8, 1, 8, False),
        "text": (0.25, 2, 8, False),
    }


@pytest.mark.parametrize(
    ("arguments", "key", "said"),
    [
        (["--objective.vision.masking.kind=bert"], "objective.vision.masking.kind", "more positions in some rows"),
        (["--objective.speech.masking.kind=block2d"], "objective.speech.masking.kind", "grid"),
        (["--objective.vision.target.top_k_layers=9"], "objective.vision.target.top_k_layers", "9 of 8"),
        (["--objective.vision.target.layers=[1,9]"], "objective.vision.target.layers", "blocks of 8"),
        (
            ["--objective.text.loss.cls_weight=1"],
            "objective.text.loss.cls_weight",
            "extra token before the positions of text",
        ),
        (["--objective.text.masking.prob=1.5"], "objective.text.masking.prob", "at most 1"),
        (["--objective.text.masking.clones=0"], "objective.text.masking.clones", "above 0"),
        (["--model.vision.predictor.groups=7"], "model.vision.predictor.groups", "does not divide"),
        (["--model.speech.predictor.kind=mlp"], "model.speech.predictor.kind", "visible_only"),
        (["--model.speech.prenet_depth=-1"], "model.speech.prenet_depth", "below 0"),
        (["--model.predictor.shared=true"], "model.vision.predictor", "all stems share one"),
        (
            ["--data.sources", "[{modality: text, shards: t, batch_unit: seconds}]"],
            "data.sources.0.batch_unit",
            "speech",
        ),
        (["--data.sources", "[{modality: text, shards: t, batch_size: 3}]"], "data.sources.0.batch_size", "3 samples"),
    ],
)
def test_a_stems_own_mistake_is_named_where_it_stands(arguments: list[str], key: str, said: str) -> None:
    data = [] if arguments[0] == "--data.sources" else ["--data", "speech=s.tar,vision=v.tar,text=t.tar"]
    recipe, _ = parse(["--recipe", "d2v2_joint_base", *data, *arguments])
    with pytest.raises(ConfigError) as error:
        recipe.check(64)
    assert error.value.key == key
    assert said in str(error.value)


def test_an_override_for_a_stem_that_is_not_there_is_refused() -> None:
    recipe, _ = parse(["--recipe", "d2v2_vision_base", "--data", "v.tar", "--objective.speech.masking.prob=0.5"])
    with pytest.raises(ConfigError, match=r"objective\.speech: is set, but the model has no stem speech"):
        recipe.check(1)


def test_an_override_below_arrays_for_a_stem_of_another_kind_is_refused() -> None:
    """It took the place of all that `objective.vision` said, without a word."""
    arguments = ["--data", "v.tar", "--objective.vision.masking.prob=0.5", "--objective.arrays.vision.masking.length=3"]
    recipe, _ = parse(["--recipe", "d2v2_vision_base", *arguments])
    with pytest.raises(ConfigError, match=r"objective\.arrays\.vision: .* Write objective\.vision\.$"):
        recipe.check(1)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["masking.tubes=[height]", "masking.kind=random"], r"set objective\.vision\.masking\.kind to blocks"),
        (["target.kind=last_layer", "target.layers=[1]"], r"choose another objective\.vision\.target\.kind"),
        (
            ["further_targets=[{kind: last_layer, layers: [1]}]"],
            r"choose another objective\.vision\.further_targets\.0\.kind",
        ),
    ],
)
def test_a_remedy_names_the_keys_where_the_values_of_a_stem_stand(arguments: list[str], remedy: str) -> None:
    """It named those of all stems, which this one does not read."""
    recipe, _ = parse(["--recipe", "tiny2_vision", *(f"--objective.vision.{argument}" for argument in arguments)])
    with pytest.raises(ConfigError, match=remedy):
        recipe.check(1)


@pytest.mark.parametrize("section", ["model.predictor", "model.vision.predictor"])
def test_a_decoder_without_convolutions_has_the_width_of_the_model(section: str) -> None:
    """With another one the first step ended in a traceback, of matrices that do not fit."""
    recipe, _ = parse(["--recipe", "tiny2_vision", f"--{section}.layers=0"])
    with pytest.raises(ConfigError, match="no convolution makes 64 channels") as error:
        recipe.check(1)
    assert error.value.key == f"{section}.layers"
    recipe.model.predictor.width = recipe.model.backbone.width
    recipe.check(1)


def test_masks_that_hide_nothing_are_refused() -> None:
    """There was nothing to learn, and the run went on. Kinds that mask one position at least are left alone."""
    arguments = ["--recipe", "tiny1_text", "--objective.text.masking.kind=bert", "--objective.text.masking.prob=0"]
    with pytest.raises(ConfigError, match="masks nothing") as error:
        parse(arguments)[0].check(1)
    assert error.value.key == "objective.text.masking.prob"
    parse(["--recipe", "tiny2_vision", "--objective.masking.prob=0"])[0].check(1)


def test_samples_of_a_single_position_are_refused() -> None:
    """Of an image of one patch none was ever masked."""
    recipe, _ = parse(["--recipe", "tiny2_vision", "--model.vision.image_size=4", "--model.vision.patch_size=4"])
    with pytest.raises(ConfigError, match=r"model\.vision: makes a single position"):
        recipe.check(1)


def test_targets_of_another_width_than_the_shared_predictor_are_refused() -> None:
    """They were accepted, and the predictor built for the stem that came last."""
    data = ["--data", "speech=s.tar,vision=v.tar,text=t.tar"]
    arguments = ["--recipe", "d2v2_joint_base_shared_decoder", *data, "--objective.speech.target.kind=input"]
    recipe, _ = parse(arguments)
    with pytest.raises(ConfigError, match="of speech, but the predictor that all stems share has 768") as error:
        recipe.check(64)
    assert error.value.key == "objective.speech.target.kind"


def test_a_source_without_repeat_beside_one_with_it_is_refused() -> None:
    sources = [SourceConfig(shards="a", repeat=2.0), SourceConfig(shards="b", modality="text")]
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.repeat"):
        DataConfig(sources=sources).check(["vision", "text"])


def test_a_stem_collapses_by_its_own_limits() -> None:
    monitor = HealthMonitor(
        HealthConfig(after=0, patience=1), {"a": HealthConfig(after=100, patience=1), "b": HealthConfig(after=0)}
    )
    values = {"target_std/a": 0.0, "target_std/b": 0.0, "prediction_std/a": 1.0, "prediction_std/b": 1.0}
    assert [sign[:12] for sign in monitor.observe(values, 50, 1.0, {"a", "b"})] == ["target_std/b"]
    assert not monitor.collapsed, "b has three log points"
    assert len(monitor.observe(values, 150, 1.0, {"a", "b"})) == 2
    assert monitor.collapsed, "a has one"
