from dataclasses import replace
from typing import Any

import pytest
import tiny_models

from d2v_scale.errors import ConfigError
from d2v_scale.finetuning.config import CtcConfig, ImageConfig, TaskConfig
from d2v_scale.parallel.config import ParallelConfig
from d2v_scale.recipe import Recipe

IMAGES: list[tuple[str, Any]] = [
    *[("erase", 7), ("mix_probability", -0.1), ("rand_augment", 11), ("mixup", -1), ("cutmix", -1)]
]
BARE = CtcConfig(channel_mask=0)
CTC: list[tuple[str, Any]] = [
    *[("time_mask", -3), ("time_mask_length", 0), ("channel_mask", 1.2), ("noise_std", -1), ("beam", 0)]
]


@pytest.mark.parametrize(
    ("task", "name", "ranks", "key"),
    [
        (TaskConfig(kind="ctc"), "v1_vision", 1, "task.kind"),
        (TaskConfig(classes=1), "v1_vision", 1, "task.classes"),
        (TaskConfig(layer_decay=0.0), "v1_vision", 1, "task.layer_decay"),
        (TaskConfig(metrics=["wer"]), "v1_vision", 1, "task.metrics"),
        (TaskConfig(kind="ctc", ctc=CtcConfig(letters="aba")), "v1_speech", 1, "task.ctc.letters"),
        (TaskConfig(kind="ctc", ctc=CtcConfig(channel_mask_length=64)), "v1_speech", 1, "task.ctc.channel_mask_length"),
        (TaskConfig(), "v1_vision", 2, "parallel"),
        *[(TaskConfig(image=ImageConfig(**{key: bad})), "v1_vision", 1, f"task.image.{key}") for key, bad in IMAGES],
        *[(TaskConfig(kind="ctc", ctc=CtcConfig(**{key: bad})), "v1_speech", 1, f"task.ctc.{key}") for key, bad in CTC],
        (TaskConfig(label_smoothing=1.5), "v1_vision", 1, "task.label_smoothing"),
        (TaskConfig(freeze_updates=-1), "v1_vision", 1, "task.freeze_updates"),
        # Without effect.
        (TaskConfig(kind="ctc", label_smoothing=0.1, ctc=BARE), "v1_speech", 1, "task.label_smoothing"),
        (TaskConfig(kind="ctc", image=ImageConfig(mixup=0.8), ctc=BARE), "v1_speech", 1, "task.image.mixup"),
        (TaskConfig(kind="regress", label_smoothing=0.1), "v1_text", 1, "task.label_smoothing"),
        (TaskConfig(image=ImageConfig(erase=0.25)), "v1_text", 1, "task.image.erase"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(task: TaskConfig, name: str, ranks: int, key: str) -> None:
    recipe = Recipe(model=tiny_models.model(name), task=task, parallel=ParallelConfig(tensor=ranks))
    with pytest.raises(ConfigError) as caught:
        recipe.check(world_size=ranks)
    assert caught.value.key == key


def test_masks_of_a_task_that_hides_nothing_are_empty() -> None:
    from d2v_scale.data2vec.masking import collate

    masks = collate(TaskConfig().masking(), length=30, sample_ids=[1, 2], seed=0, step=0)
    assert not masks.masked_rt.any()
    hidden = collate(TaskConfig(kind="ctc").masking(), length=200, sample_ids=[1, 2], seed=0, step=0)
    assert 0.3 < hidden.masked_rt.mean() < 0.65


def test_mixing_within_micro_batches_of_one_image_is_refused() -> None:
    """It would be off, and nobody would know."""
    task = TaskConfig(image=ImageConfig(mixup=0.8))
    recipe = Recipe(model=tiny_models.model("v1_vision"), task=task, global_batch_size=8)
    recipe.check(world_size=4)
    for changed in (recipe, replace(recipe, accumulation=2)):
        with pytest.raises(ConfigError, match=r"task\.image: mixes the images of a micro-batch, which are 1 here"):
            changed.check(world_size=8 if changed is recipe else 4)
    replace(recipe, task=TaskConfig(image=ImageConfig(rand_augment=9))).check(world_size=8)
