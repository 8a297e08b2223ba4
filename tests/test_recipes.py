"""Every published model is a recipe of its own, and it is the size that was published."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_scale import modalities
from d2v_scale.command_line import RECIPES, parse
from d2v_scale.data2vec.masking import collate
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.optim import learning_rate
from d2v_scale.parallel.groups import single_process
from d2v_scale.recipe import Recipe

os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Encoder, pretraining head or decoder.
PUBLISHED_PARAMETERS = {
    "d2v1_speech_base": (93_164_288, 590_592),
    "d2v1_speech_audioset": (93_164_288, 590_592),
    "d2v1_speech_large": (313_276_416, 1_049_600),
    "d2v1_vision_base": (85_666_128, 590_592),
    "d2v1_vision_large": (303_137_216, 1_049_600),
    "d2v1_vision_large_phase2": (303_137_216, 1_049_600),
    "d2v1_text_base": (124_054_272, 2_361_600),
    "d2v2_speech_base": (93_163_532, 619_776),
    "d2v2_speech_large": (313_275_408, 1_908_736),
    "d2v2_vision_base": (85_647_360, 2_585_856),
    "d2v2_vision_large": (303_099_904, 5_967_872),
    "d2v2_vision_huge16": (630_666_240, 6_639_872),
    "d2v2_vision_huge14": (630_435_840, 6_639_872),
    "d2v2_audio_eat_base": (85_254_144, 2_585_856),
    "d2v2_text_base": (124_054_272, 28_907_520),
    "d2v2_text_large_a": (354_309_120, 31_070_464),
    "d2v2_text_large_b": (354_309_120, 31_070_464),
}
# Sizes that nobody has published: nothing to compare the exact numbers with.
OUR_BILLIONS = {"d2v2_video_large": 0.3, "d2v2_vision_1b": 1.1, "d2v2_speech_1b": 1.0, "d2v2_vision_7b": 6.9}
# Models of several modalities, counted in test_own_settings.py.
JOINT = ("d2v2_joint_base", "d2v2_joint_base_shared_decoder", "d2v2_joint_large")
# Positions of a typical input, and how many of them are masked where that number is fixed.
FIXED_MASKS = {
    "d2v2_speech_base": (780, 390),
    "d2v2_speech_large": (999, 549),
    "d2v2_vision_base": (196, 157),
    "d2v2_vision_large": (196, 147),
    "d2v2_vision_huge16": (196, 147),
    "d2v2_vision_huge14": (256, 192),
    "d2v2_audio_eat_base": (512, 410),
    "d2v2_text_base": (512, 246),
    "d2v2_text_large_a": (512, 256),
    "d2v2_text_large_b": (512, 256),
}


@pytest.fixture(scope="module", autouse=True)
def world() -> None:
    single_process()


def load(name: str) -> Recipe:
    recipe, _ = parse(["--recipe", name])
    return recipe


def test_every_published_recipe_is_listed_here() -> None:
    assert {path.stem for path in RECIPES.glob("d2v*.yaml")} == {*PUBLISHED_PARAMETERS, *OUR_BILLIONS, *JOINT}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_acceptance_1_parameter_counts_are_the_published_ones(name: str) -> None:
    recipe = load(name)
    recipe.check(world_size=1)
    assert recipe.name == name
    with torch.device("meta"):
        student = Student(recipe.model)
        teacher = Teacher(recipe.model, recipe.objective.target, recipe.parts())
    counts = {True: 0, False: 0}
    for parameter_name, parameter in student.named_parameters():
        counts[parameter_name.startswith("predictors.")] += parameter.numel()
    assert (counts[False], counts[True]) == PUBLISHED_PARAMETERS[name]
    owned = {n for n, _ in student.named_parameters() if recipe.parts().role(n) != "absent"}
    assert {n for n, _ in teacher.named_parameters()} == owned


@pytest.mark.parametrize("name", FIXED_MASKS)
def test_acceptance_3_masked_positions_are_the_published_number(name: str) -> None:
    recipe = load(name)
    length, count = FIXED_MASKS[name]
    [stem] = modalities.stems(recipe.model)
    place = {"length": length} if stem.fixed_grid is None else {"grid": stem.fixed_grid}
    masks = collate(recipe.objective.masking, sample_ids=[0, 1], seed=0, step=0, **place)  # type: ignore[arg-type]
    assert masks.masked_rt.shape == (2 * recipe.objective.masking.clones, length)
    assert set(masks.masked_rt.sum(1).tolist()) == {count}


def test_masks_of_videos_are_the_same_in_all_frames_and_keep_blocks() -> None:
    [masking] = load("d2v2_video_large").masking().values()
    frames, side = 8, 14
    masks = collate(masking, grid=(frames, side, side), sample_ids=[3], seed=0, step=1)
    hidden = masks.masked_rt.reshape(-1, frames, side, side)
    assert (hidden == hidden[:, :1]).all()
    assert set(hidden[:, 0].sum((1, 2)).tolist()) == {177}
    blocks = np.lib.stride_tricks.sliding_window_view(~hidden[:, 0], (3, 3), axis=(1, 2)).all(axis=(3, 4))
    assert blocks.any(axis=(1, 2)).all()


@pytest.mark.parametrize("name", OUR_BILLIONS)
def test_sizes_of_our_own_are_what_they_are_called(name: str) -> None:
    recipe = load(name)
    recipe.check(world_size=64)
    assert recipe.name == name
    with torch.device("meta"):
        student = Student(recipe.model)
        teacher = Teacher(recipe.model, recipe.objective.target, recipe.parts())
    count = sum(parameter.numel() for parameter in student.parameters())
    assert round(count / 1e9, 1) == OUR_BILLIONS[name]
    # Built without a byte of values.
    for tensor in (*student.parameters(), *student.buffers(), *teacher.parameters(), *teacher.buffers()):
        assert tensor.is_meta
        assert tensor.untyped_storage().data_ptr() == 0


@pytest.mark.parametrize("name", [*PUBLISHED_PARAMETERS, *OUR_BILLIONS])
def test_schedules_reach_their_peak_and_end_low(name: str) -> None:
    optim = load(name).optim
    peak = max(learning_rate(optim, n) for n in range(0, optim.max_steps, max(1, optim.max_steps // 2000)))
    assert peak == pytest.approx(optim.lr, rel=0.01)
    assert learning_rate(optim, optim.max_steps) <= 0.011 * optim.lr


@pytest.mark.parametrize("name", [*PUBLISHED_PARAMETERS, *OUR_BILLIONS])
def test_a_recipe_says_where_it_comes_from(name: str) -> None:
    text = Path(RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# data2vec")
    assert "Source:" in text or "OURS" in text


TUNED = sorted(path.stem for path in RECIPES.glob("finetune_*.yaml"))


@pytest.mark.parametrize("name", TUNED)
def test_fine_tuning_recipes_fit_the_models_they_are_for(name: str) -> None:
    pretrained = {"speech": "d2v1_speech_base", "vision": "d2v1_vision_base", "text": "d2v1_text_base"}
    recipe, _ = parse(["--recipe", name, "--data", "shards.tar"])
    [modality] = {source.modality for source in recipe.data.sources}
    if "v2" in name:
        pretrained |= {"speech": "d2v2_speech_large", "vision": "d2v2_vision_base"}
    if not recipe.model.modalities:
        recipe.model = load(pretrained[modality]).model
    recipe.check(world_size=1)
    recipe.data.check(recipe.model.modalities)
    assert recipe.name == name
    peak = max(learning_rate(recipe.optim, n) for n in range(0, recipe.optim.max_steps, recipe.optim.max_steps // 200))
    assert peak == pytest.approx(recipe.optim.lr, rel=0.01)
    assert Path(RECIPES / f"{name}.yaml").read_text().startswith("# Fine-tuning")
