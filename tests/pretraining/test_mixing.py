"""Steps that read several sources: what each adds to the loss, and what is said of one whose samples were lost."""

import dataclasses
from typing import Any

import pytest
import tiny_mixtures
import tiny_models
import torch

from d2v_scale.batch import Batch
from d2v_scale.data2vec.config import LossConfig, MaskingConfig, ObjectiveConfig
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import ds_config, groups
from d2v_scale.pretraining.breakdown import LossBreakdown
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import OF_A_STEP, StepLoss, collapse_statistics, read, train_step
from d2v_scale.recipe import Recipe

pytestmark = pytest.mark.usefixtures("world_of_one")


def engines(recipe: Recipe, micro_batches: int) -> tuple[Any, Any]:
    recipe.accumulation = micro_batches
    numbers = ds_config.RecipeNumbers(precision="fp32", accumulation=micro_batches, clip=0.0)
    config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, groups.single_process())
    student.module.train()
    return student, teacher


def blank(batch: Batch) -> Batch:
    """The row that stands for samples which could not be read."""
    masked_rt = torch.zeros_like(batch.masked_rt[: batch.clones])
    return dataclasses.replace(
        batch,
        inputs=torch.zeros_like(batch.inputs[:1]),
        valid=None if batch.valid is None else batch.valid[:1],
        student_inputs=None if batch.student_inputs is None else batch.student_inputs[:1],
        real_bt=None,
        masked_rt=masked_rt,
        sample_ids=torch.full((1,), -1),
        keys=("",),
        layout=None,  # type: ignore[arg-type]
    )


def shares(
    student: Any, teacher: Any, recipe: Recipe, batches: list[Batch], weights: dict[str, float]
) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """By source: its part of the loss, and the gradient of that."""
    made = teacher.module
    step = StepLoss(
        recipe.objective,
        batches,
        student.topology,
        recipe.model.backbone.width,
        made.targets,
        getattr(made, "state", {}),
        weights,
        None,
        observe=False,
    )
    named, found = dict(student.module.named_parameters()), {}
    for number, batch in enumerate(batches):
        output = student.module(batch, Draw(1, 0))
        share = step.share(
            batch, output.predictions, output.cls, student.make_targets(batch, output.features_btd)
        ) / len(batches)
        gradient = torch.autograd.grad(share, list(named.values()), allow_unused=True)
        whole = {name: x for name, x in zip(named, gradient, strict=True) if x is not None}
        found[f"{number} {batch.source}"] = float(share.detach()), whole
    return found


@pytest.mark.parametrize("name", tiny_mixtures.NAMES)
def test_twice_the_weight_is_twice_the_gradient_of_that_source_and_of_no_other(name: str) -> None:
    """Exactly; and what one source masks changes no other's part."""
    recipe = Recipe(model=tiny_mixtures.model(name), objective=tiny_mixtures.objective(name))
    batches = [part for n in range(len(tiny_mixtures.STEMS[name])) for part in tiny_mixtures.parts(name, n, 2, 1, 0)]
    student, teacher = engines(recipe, len(batches))
    chosen = batches[0].source
    plain = shares(student, teacher, recipe, batches, {chosen: 1.0})
    doubled = shares(student, teacher, recipe, batches, {chosen: 2.0})
    # Of the first source a single position is masked, and of one sample.
    masked_rt = torch.zeros_like(batches[0].masked_rt)
    masked_rt[:, 0] = True
    fewer = dataclasses.replace(batches[0], masked_rt=masked_rt, layout=None)  # type: ignore[arg-type]
    changed = shares(student, teacher, recipe, [fewer, *batches[1:]], {chosen: 1.0})
    for key, (loss, gradient) in plain.items():
        factor = 2 if key.endswith(chosen) else 1
        again, gradients = doubled[key]
        assert again == factor * loss
        assert gradients.keys() == gradient.keys()
        for parameter, value in gradient.items():
            assert torch.equal(gradients[parameter], factor * value), (key, parameter)
        if factor == 1:
            assert changed[key][0] == loss
            assert all(torch.equal(changed[key][1][parameter], value) for parameter, value in gradient.items())
    assert changed[f"0 {chosen}"][0] != plain[f"0 {chosen}"][0]
    teacher.destroy()
    student.destroy()


def figures(recipe: Recipe, batches: list[Batch]) -> dict[str, float]:
    student, teacher = engines(recipe, len(batches))
    sources = list(dict.fromkeys(batch.source for batch in batches))
    told_apart = sources if len(sources) > 1 else []
    widths = dict.fromkeys(told_apart, (recipe.model.backbone.width,) * 2)
    breakdown = LossBreakdown(sources, torch.device("cpu"), widths)
    result, seen = train_step(
        student, teacher, batches, recipe.objective, Draw(1, 0), observe=True, breakdown=breakdown
    )
    assert result.applied
    found = {
        **collapse_statistics(seen, student.topology, told_apart),
        **breakdown.figures(student.topology),
    }
    assert all(torch.isfinite(p).all() for p in student.module.parameters())
    teacher.destroy()
    student.destroy()
    return read(found, seen) | {"samples": float(seen.samples)}


def test_a_source_that_lost_all_its_samples_has_no_loss_and_no_spread() -> None:
    name = "v2_triple"
    recipe = Recipe(model=tiny_mixtures.model(name), objective=tiny_mixtures.objective(name))
    whole = [part for n in range(3) for part in tiny_mixtures.parts(name, n, 4, 1, 0)]
    there = figures(recipe, whole)
    assert there["samples"] == 12
    assert there["loss"] == pytest.approx(there["loss/vision"] + there["loss/speech"] + 0.5 * there["loss/text"])
    lost = figures(recipe, [whole[0], blank(whole[1]), whole[2]])
    assert lost["samples"] == 8
    stems = ("vision", "speech", "text")
    own = ("loss", "target_std", "prediction_std", "masked_share", *OF_A_STEP)
    assert set(there) - set(lost) == {f"{figure}/speech" for figure in own}
    assert there["target_rank"] == pytest.approx(sum(there[f"target_rank/{one}"] for one in stems) / 3)
    assert there["stem_std"] == pytest.approx(sum(there[f"stem_std/{one}"] for one in stems) / 3)
    assert lost["loss"] == pytest.approx(lost["loss/vision"] + 0.5 * lost["loss/text"])
    assert lost["target_std"] == pytest.approx((lost["target_std/vision"] + lost["target_std/text"]) / 2)
    # Nothing is left of a step of which everything was lost.
    assert figures(recipe, [blank(batch) for batch in whole]) == {"samples": 0}


@pytest.mark.parametrize("name", ["v1_vision", "v2_speech", "v2_vision+2"])
def test_a_step_that_lost_all_its_samples_was_recorded_as_loss_0(name: str) -> None:
    """Of one modality, too; and its spread, of nothing, was judged as a collapse."""
    clones = 2 if name.startswith("v2") else 1
    objective = ObjectiveConfig(
        masking=MaskingConfig(clones=clones),
        target=tiny_models.target_of(name),
        loss=LossConfig(cls_weight=0.5 if "+" in name else 0.0),
    )
    recipe = Recipe(model=tiny_models.model(name), objective=objective)
    batch = tiny_models.batch(name, 2, clones)
    assert {"loss", "target_std", "prediction_std", "stem_std"} <= figures(recipe, [batch]).keys()
    assert figures(recipe, [blank(batch), blank(batch)]) == {"samples": 0}
    # What the last micro-batch cannot say the one before it has said.
    partly = figures(recipe, [batch, blank(batch)])
    assert partly == pytest.approx(figures(recipe, [batch, blank(batch), blank(batch)]))
    assert partly["target_rank"] > 1
