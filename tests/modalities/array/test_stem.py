"""Patches of arrays: the same numbers as of images, one linear at any number of axes, positions of what is hidden."""

import io
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from d2v_scale.data.config import DataConfig, SourceConfig, VisionData
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import LossConfig, MaskingConfig, ObjectiveConfig
from d2v_scale.model import init
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.patches import PatchContext, PatchFeatures
from d2v_scale.model.stem_config import AnyStem, ArrayAxis, ArrayStem
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import ds_config, groups
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe
from d2v_scale.shards.writing import write_set

STEPS = 4


def stem_of(**axes: tuple[int, int]) -> ArrayStem:
    return ArrayStem(channels=2, axes={name: ArrayAxis(patch=p, extent=e) for name, (p, e) in axes.items()})


@pytest.mark.parametrize(
    "stem",
    [
        stem_of(a=(3, 12)),
        stem_of(a=(3, 6), b=(2, 4)),
        stem_of(a=(3, 6), b=(2, 4), c=(1, 2)),
        stem_of(a=(3, 6), b=(2, 4), c=(1, 2), d=(2, 6)),
    ],
)
def test_a_patch_of_any_number_of_axes_goes_through_one_linear(stem: ArrayStem) -> None:
    model = ModelConfig(arrays={"heart": stem}, backbone=tiny_models.model("v2_vision").backbone)
    features = PatchFeatures(model, stem.channels, stem.patch)
    init.initialize(features, seed=1)
    arrays = torch.randn(3, 2, *stem.extents, generator=torch.Generator().manual_seed(0))
    found_btd = features(arrays)
    assert found_btd.shape == (3, np.prod(stem.grid), 32)
    weight = features.patch.weight.reshape(32, 2, *stem.patch)
    for number, place in enumerate(np.ndindex(*stem.grid)):
        inside = tuple(slice(k * size, (k + 1) * size) for k, size in zip(place, stem.patch, strict=True))
        patch = arrays[(slice(None), slice(None), *inside)]
        expected_bd = torch.einsum("bv,dv->bd", patch.flatten(1), weight.flatten(1)) + features.patch.bias
        assert torch.allclose(found_btd[:, number], expected_bd, atol=1e-5)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_a_hidden_patch_of_1_0_tells_where_it_is(positions: str) -> None:
    """Positions were added before masked patches were replaced, which left all of these alike."""
    stem = stem_of(a=(3, 12))
    stem.positions = positions  # type: ignore[assignment]
    model = ModelConfig(arrays={"heart": stem}, backbone=tiny_models.model("v2_vision").backbone)
    context = PatchContext(model, stem.grid, stem.positions)
    init.initialize(context, seed=1)
    masked_rt = torch.tensor([[True, True, False, False]])
    states_rsd = context(torch.randn(1, 4, 32), masked_rt, None, None, 1)
    assert not torch.equal(states_rsd[0, 0], states_rsd[0, 1])


def images(folder: Path) -> None:
    """The same images as PNGs and as arrays."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    files = {"image": [], "array": []}  # type: ignore[var-annotated]
    for number, image in enumerate(pixels):
        png, npy = io.BytesIO(), io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        np.save(npy, image.transpose(2, 0, 1))
        files["image"].append({"__key__": f"{number:04d}", "png": png.getvalue()})
        files["array"].append({"__key__": f"{number:04d}", "npy": npy.getvalue()})
    for content, samples in files.items():
        write_set(folder / content, "train", content, samples, per_shard=12)  # type: ignore[arg-type]


def losses(folder: Path, version: str, name: str, stem: AnyStem) -> list[float]:
    """Of a few steps."""
    plain = tiny_models.model(f"{version}_vision")
    second = version == "v2"
    model = ModelConfig(
        visible_only=second,
        backbone=plain.backbone,
        predictor=plain.predictor,
        init=plain.init,
        **({"vision": stem} if name == "vision" else {"arrays": {name: stem}}),  # type: ignore[arg-type]
    )
    objective = ObjectiveConfig(
        masking=MaskingConfig(kind="blocks", length=2, prob=0.5, clones=2 if second else 1),
        target=tiny_models.target_of(f"{version}_vision"),
        loss=LossConfig(cls_weight=0.5 if second else 0.0),
    )
    pattern = str(folder / ("image" if name == "vision" else "array") / "train-*.tar")
    data = DataConfig(
        sources=[SourceConfig(shards=pattern, modality=name, name="same")],
        workers=0,
        vision=VisionData(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, mean=[0.5] * 3, std=[0.25] * 3),
    )
    recipe = Recipe(model=model, objective=objective, data=data, global_batch_size=8, seed=3)
    recipe.check(1)
    config = ds_config.resolve(
        {"zero_optimization": {"stage": 1}},
        ds_config.RecipeNumbers(precision="fp32", accumulation=1),
        recipe.parallel,
        1,
    )
    student, teacher = build_engines(recipe, config, groups.single_process())
    loader = StepLoader(data, model, recipe.masking(), seed=3, global_batch_size=8)
    found = []
    for step in range(STEPS):
        batches = next(loader)
        result, seen = train_step(student, teacher, batches, recipe.objective, Draw(3, step), observe=True)
        assert result.applied
        found.append(float(seen.loss))
    teacher.destroy()
    student.destroy()
    return found


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_images_as_arrays_give_the_losses_of_images_bit_by_bit(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path)
    side = ArrayAxis(patch=4, extent=16)
    stem = ArrayStem(
        channels=3,
        axes={"height": side, "width": side},
        extra_tokens=1,
        normalise="moments",
        mean=[127.5],
        std=[63.75],
    )
    expected = losses(tmp_path, version, "vision", tiny_models.vision("sincos"))
    drawn = init.initial_tensor

    def as_of_images(name: str, *others: object) -> torch.Tensor:
        return drawn(name.replace(".pictures.", ".vision."), *others)  # type: ignore[arg-type]

    monkeypatch.setattr(init, "initial_tensor", as_of_images)
    assert losses(tmp_path, version, "pictures", stem) == expected
    assert len(set(expected)) == STEPS
