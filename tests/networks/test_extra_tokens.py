"""Any number of extra tokens, of every kind of stem."""

import dataclasses
import math

import pytest
import tiny_models
import torch

from d2v_scale.command_line import parse
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig, MaskingConfig, ObjectiveConfig
from d2v_scale.errors import ConfigError
from d2v_scale.modalities import published_parts
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student
from d2v_scale.optim import OptimConfig, set_rates
from d2v_scale.parallel import ds_config, groups
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe

USUAL = {"vision": 1, "speech": 0, "text": 0}


def built(name: str) -> Student:
    student = Student(tiny_models.model(name))
    initialize(student, 1)
    return student


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_stem_trains_with_any_number_of_extra_tokens(name: str, count: int) -> None:
    wanted = f"{name}+{count}"
    model, modality = tiny_models.model(wanted), tiny_models.modality_of(wanted)
    compared = model.visible_only and count > 0
    clones = 2 if model.visible_only else 1
    recipe = Recipe(
        model=model,
        objective=ObjectiveConfig(
            masking=MaskingConfig(clones=clones),
            target=tiny_models.target_of(name),
            loss=LossConfig(cls_weight=0.5 if compared else 0.0),
        ),
        optim=OptimConfig(lr=1e-2, schedule="constant", max_steps=10),
        teacher_parts=published_parts(model),
    )
    numbers = ds_config.RecipeNumbers(precision="fp32")
    config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, groups.single_process())
    student.module.train()
    key = f"stems.{modality}.context.cls"
    before = {n: p.detach().clone() for n, p in student.module.named_parameters()}
    assert (key in before) == (count > 0)
    batches = [tiny_models.batch(wanted, 2, clones, "vision" not in name)]
    for step in range(2):
        set_rates(student.optimizer, recipe.optim, step)
        result, seen = train_step(student, teacher, batches, recipe.objective, Draw(1, step), observe=True)
        assert result.applied
        assert math.isfinite(float(seen.loss))
    if count:
        moved = dict(student.module.named_parameters())[key].detach()
        assert moved.shape == (1, count, 32)
        assert bool((moved != before[key]).any(dim=-1).all()), "each token learns"
        assert not torch.equal(dict(teacher.module.named_parameters())[key], before[key])
    teacher.destroy()
    student.destroy()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_null_is_what_checkpoints_of_before_hold(name: str) -> None:
    usual = USUAL[tiny_models.modality_of(name)]
    plain, written = dict(built(name).named_parameters()), dict(built(f"{name}+{usual}").named_parameters())
    assert list(plain) == list(written)
    assert all(torch.equal(plain[key], written[key]) for key in plain)
    assert (f"stems.{tiny_models.modality_of(name)}.context.cls" in plain) == (usual == 1)


@pytest.mark.usefixtures("world_of_one")
def test_the_last_token_is_compared_and_none_has_a_distance() -> None:
    student = built("v2_speech+2")
    batch = tiny_models.batch("v2_speech+2", padded=True)
    keys: list[torch.Tensor] = []
    student.blocks[0].register_forward_pre_hook(lambda module, args: keys.append(args[1]))
    carry, _ = student.enter(batch)
    student.run_blocks(batch, carry, Draw(1, 0))
    _, encoder_rsd, (cls_rd,) = student.leave(batch, carry, Draw(1, 0))
    assert cls_rd is not None
    assert torch.equal(cls_rd, carry.states_rsd[:, 1])
    assert encoder_rsd.shape[1] == carry.states_rsd.shape[1] - 2
    (bias_rhss,) = keys
    assert not bias_rhss[:, :, :, :2].any(), "extra tokens are no padding"
    assert set(bias_rhss[:, :, :2].unique().tolist()) <= {0.0, -math.inf}
    targets_btd = torch.randn(3, 19, 32)
    expected = ((cls_rd - targets_btd.mean(dim=1)) ** 2).sum() / math.sqrt(32)
    assert torch.allclose(loss.cls_loss_sum(cls_rd, targets_btd, LossConfig(cls_weight=1.0), 32), expected)


@pytest.mark.usefixtures("world_of_one")
def test_a_row_of_nothing_but_padding_sees_its_extra_tokens() -> None:
    student = built("v2_text+1")
    batch = tiny_models.batch("v2_text+1", padded=True)
    assert batch.valid is not None
    batch = dataclasses.replace(
        batch,
        inputs=batch.inputs.index_fill(0, torch.tensor([1]), 1),
        valid=batch.valid.index_fill(0, torch.tensor([1]), 0),
    )
    out = student(batch, Draw(1, 0))
    assert bool(out.encoder_rsd.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--model.vision.extra_tokens=-1"], "model.vision.extra_tokens"),
        (["--model.vision.extra_tokens=0", "--objective.loss.cls_weight=1"], "objective.loss.cls_weight"),
        (["--model.vision.extra_tokens=0", "--objective.vision.loss.cls_weight=1"], "objective.vision.loss.cls_weight"),
    ],
)
def test_what_needs_a_token_that_is_not_there_is_refused_by_its_key(arguments: list[str], key: str) -> None:
    recipe, _ = parse(["--recipe", "d2v2_vision_base", "--objective.loss.cls_weight=0", *arguments])
    with pytest.raises(ConfigError) as error:
        recipe.check(1)
    assert error.value.key == key
