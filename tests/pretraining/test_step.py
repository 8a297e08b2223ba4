"""One optimizer step of every kind of model."""

import dataclasses
import time
import warnings
from collections.abc import Callable

import host_syncs
import pytest
import tiny_models
import torch

from d2v_scale.data2vec.config import LossConfig, MaskingConfig, ObjectiveConfig
from d2v_scale.modalities import published_parts
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import ds_config, groups
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe

OF_EVERY_KIND = {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.2, "layer_drop": 0.3}


def train(name: str, stage: int, precision: str, checkpointing: bool, ignore: Callable[[bool], None]) -> None:
    """Five steps of a small model, with everything on that draws or skips; the first three are ignored."""
    topology = groups.single_process()
    model = tiny_models.model(name, **OF_EVERY_KIND)
    model.activation_checkpointing = checkpointing
    loss = LossConfig(cls_weight=0.01 if name == "v2_vision" else 0.0)
    recipe = Recipe(
        model=model,
        objective=ObjectiveConfig(target=tiny_models.target_of(name), loss=loss),
        teacher_parts=published_parts(model),
        accumulation=2,
    )
    numbers = ds_config.RecipeNumbers(precision=precision, accumulation=2, clip=1.0)
    config = ds_config.resolve({"zero_optimization": {"stage": stage}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, topology)
    student.module.train()
    clones = 2 if name.startswith("v2") else 1
    padded = not name.endswith("vision")
    batches = [tiny_models.batch(name, 2, clones, padded, seed).to(topology.device) for seed in range(2)]
    for step in range(5):
        ignore(step < 3)
        train_step(student, teacher, batches, recipe.objective, Draw(1, step), observe=False)
    ignore(True)
    teacher.destroy()
    student.destroy()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_no_model_waits_for_the_device(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = 3 if name in ("v1_vision", "v2_speech") else 1
    with host_syncs.recorded(monkeypatch) as syncs:
        train(name, stage, precision, name == "v2_text", lambda value: setattr(syncs, "ignoring", value))
    assert not syncs.found, syncs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_no_model_waits_for_a_gpu(name: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, asked of the device itself."""
    with host_syncs.recorded_by_the_device(monkeypatch) as syncs:
        train(name, stage, "bf16", False, lambda value: setattr(syncs, "ignoring", value))
    assert not syncs.found, syncs


def test_what_the_device_warns_of_is_found_but_for_the_waits_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    warning = "import warnings\ndef {0}():\n    warnings.warn('called a synchronizing CUDA operation')\n{0}()"
    with host_syncs.recorded_by_the_device(monkeypatch) as syncs:
        syncs.ignoring = False
        for file, function in [("stage3.py", "step"), ("partition_parameters.py", "wait"), ("stage3.py", "step")]:
            exec(compile(warning.format(function), f"/deepspeed/{file}", "exec"), {})
        warnings.warn("something else", stacklevel=1)
    assert len(syncs.found) == 1
    assert syncs.found.total() == 2
    assert "wait in stage3.py:step" in str(syncs)


@pytest.mark.usefixtures("world_of_one")
def test_the_time_of_the_update_is_without_that_of_its_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """On logged steps, the only ones whose time is recorded, it was eleven times the update's."""
    topology = groups.single_process()
    recipe = Recipe(
        model=tiny_models.model("v1_text"), objective=ObjectiveConfig(target=tiny_models.target_of("v1_text"))
    )
    numbers = ds_config.RecipeNumbers(precision="fp32")
    config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, topology)
    student.module.train()
    measured = teacher.measure
    monkeypatch.setattr(teacher, "measure", lambda: (time.sleep(1), measured()))
    _, seen = train_step(student, teacher, [tiny_models.batch("v1_text")], recipe.objective, Draw(1, 0), observe=True)
    assert 0 < seen.ema_time.seconds() < 0.9
    assert float(teacher.health()["teacher_norm"]) > 0
    teacher.destroy()
    student.destroy()


@pytest.mark.usefixtures("world_of_one")
def test_a_blank_row_adds_nothing_to_the_cls_loss() -> None:
    """It stands for samples that could not be read; its clones entered the CLS term and its count of rows."""
    blank = tiny_models.batch("v2_vision", 1, 2)
    blank = dataclasses.replace(
        blank,
        inputs=torch.zeros_like(blank.inputs),
        masked_rt=torch.zeros_like(blank.masked_rt),
        sample_ids=torch.full((1,), -1),
        keys=("",),
        layout=None,  # type: ignore[arg-type]
    )
    batch, losses, samples = tiny_models.batch("v2_vision", 2, 2), [], []
    for batches in ([batch], [batch, blank]):
        recipe = Recipe(
            model=tiny_models.model("v2_vision"),
            objective=ObjectiveConfig(
                masking=MaskingConfig(clones=2),
                target=tiny_models.target_of("v2_vision"),
                loss=LossConfig(cls_weight=0.5),
            ),
            accumulation=len(batches),
        )
        numbers = ds_config.RecipeNumbers(precision="fp32", accumulation=len(batches))
        config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
        student, teacher = build_engines(recipe, config, groups.single_process())
        _, seen = train_step(student, teacher, batches, recipe.objective, Draw(1, 0), observe=False)
        losses.append(float(seen.loss))
        samples.append(float(seen.samples))
        teacher.destroy()
        student.destroy()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert samples == [2, 2]


def test_reads_of_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder itself: whatever reads a value is counted, what computes is not."""
    x = torch.arange(4.0)
    reads: list[Callable[[], object]] = [
        lambda: x[0].item(),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: bool(x[0]),
        lambda: int(x[1]),
        lambda: x[x > 1],
        lambda: x.repeat_interleave(torch.tensor([1, 2, 3, 4])),
        lambda: torch.equal(x, x),
    ]
    with host_syncs.recorded(monkeypatch) as syncs:
        syncs.ignoring = False
        for read in reads:
            syncs.found.clear()
            read()
            assert syncs.found.total() >= 1, read
        syncs.found.clear()
        x.repeat_interleave(2).index_select(0, torch.tensor([1])).add(x.sum()).to(torch.float64)
    assert not syncs.found, syncs
