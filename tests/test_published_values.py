"""What the published recipes say, typed a second time from the specification (5.2, 5.3, 4.4 and 7), not from the YAML.

A batch is what all processes of the published run read in a step; updates are epochs times whole batches of 1,281,167
images.
"""

import functools
from typing import Any

import pytest

from d2v_scale.command_line import parse
from d2v_scale.recipe import Recipe

Row = tuple[Any, ...]


def load(name: str) -> Recipe:
    return parse(["--recipe", name, "--data", "shards.tar"])[0]


def values(recipe: Recipe, section: str, keys: str) -> Row:
    """The values of keys below a section."""
    start = functools.reduce(getattr, section.split(".") if section else [], recipe)
    return tuple(functools.reduce(getattr, key.split("."), start) for key in keys.split())  # type: ignore[arg-type]


# 5.2 and 5.3. Batch and its unit; peak, warm-up, updates; Adam's betas and epsilon, weight decay, clip (0: none).
OPTIMISATION: dict[str, Row] = {
    "d2v1_speech_base": (3800, "seconds", 5e-4, "tri_stage", 0, 400_000, (0.9, 0.98), 1e-6, 0.01, 0),
    "d2v1_speech_audioset": (5100, "seconds", 5e-4, "cosine", 10_000, 200_000, (0.9, 0.98), 1e-6, 0.01, 0),
    "d2v1_text_base": (256 * 512, "tokens", 2e-4, "cosine", 10_000, 1_000_000, (0.9, 0.98), 1e-6, 0.01, 5),
    "d2v1_vision_base": (2048, "samples", 2e-3, "cosine", 10 * 625, 800 * 625, (0.9, 0.999), 1e-8, 0.05, 3),
    "d2v1_vision_large": (4096, "samples", 1e-3, "cosine", 80 * 312, 800 * 312, (0.9, 0.999), 1e-8, 0.05, 3),
    "d2v1_vision_large_phase2": (4096, "samples", 1e-3, "cosine", 40 * 312, 800 * 312, (0.9, 0.999), 1e-8, 0.05, 3),
    "d2v2_speech_base": (500, "seconds", 7.5e-4, "cosine", 8000, 400_000, (0.9, 0.98), 1e-6, 0.01, 0),
    "d2v2_speech_large": (960, "seconds", 4e-4, "cosine", 10_000, 600_000, (0.9, 0.98), 1e-6, 0.01, 1),
    "d2v2_text_base": (64 * 512, "tokens", 2e-4, "cosine", 4000, 1_000_000, (0.9, 0.98), 1e-6, 0.01, 1),
    "d2v2_text_large_a": (64 * 512, "tokens", 1e-4, "cosine", 4000, 600_000, (0.9, 0.98), 1e-6, 0.01, 1),
    "d2v2_text_large_b": (64 * 512, "tokens", 1e-4, "cosine", 4000, 1_000_000, (0.9, 0.98), 1e-6, 0.01, 1),
    "d2v2_vision_base": (256, "samples", 1e-3, "cosine", 50_040, 375_300, (0.9, 0.95), 1e-8, 0.05, 4),
    "d2v2_vision_large": (128, "samples", 4e-4, "cosine", 50_040, 375_300, (0.9, 0.95), 1e-8, 0.05, 4),
    "d2v2_vision_huge16": (128, "samples", 4e-4, "cosine", 50_040, 375_300, (0.9, 0.95), 1e-8, 0.05, 4),
    "d2v2_vision_huge14": (256, "samples", 4e-4, "cosine", 50_040, 500_000, (0.9, 0.95), 1e-8, 0.05, 4),
    "d2v2_audio_eat_base": (4 * 12, "samples", 5e-4, "cosine", 53_333, 400_000, (0.9, 0.95), 1e-8, 0.05, 4),
}
# K, norms before and after the mean over layers, beta (0: squared error); tau from, to, over how many updates.
TARGETS: dict[str, Row] = {
    "d2v1_speech_base": (8, "instance", "none", 0, 0.999, 0.9999, 30_000),
    "d2v1_speech_audioset": (12, "instance", "layer", 0, 0.999, 0.9999, 30_000),
    "d2v1_text_base": (10, "layer", "none", 4, 0.999, 0.9999, 300_000),
    "d2v1_vision_base": (6, "layer", "layer", 2, 0.9998, 0.9998, 0),
    "d2v1_vision_large": (6, "layer", "layer", 2, 0.9998, 0.9998, 0),
    "d2v1_vision_large_phase2": (6, "layer", "layer", 2, 0.9999, 0.9999, 0),
    "d2v2_speech_base": (8, "instance", "none", 0, 0.999, 0.99999, 75_000),
    "d2v2_speech_large": (16, "instance", "none", 0, 0.9997, 1, 300_000),
    "d2v2_text_base": (12, "instance", "none", 0, 0.9999, 0.99999, 100_000),
    "d2v2_text_large_a": (24, "layer", "instance", 0, 0.9999, 0.99999, 100_000),
    "d2v2_text_large_b": (24, "layer", "instance", 4, 0.9999, 0.99999, 100_000),
    "d2v2_vision_base": (10, "instance", "layer", 0, 0.9998, 0.99999, 100_000),
    "d2v2_vision_large": (18, "instance", "layer", 0, 0.9998, 0.99999, 150_000),
    "d2v2_vision_huge16": (24, "instance", "layer", 0, 0.9998, 0.99995, 150_000),
    "d2v2_vision_huge14": (24, "instance", "layer", 0, 0.9998, 1, 300_000),
    "d2v2_audio_eat_base": (12, "instance", "layer", 0, 0.9998, 0.99999, 100_000),
}
# Probability or R, length or b, A, inverse, M.
MASKS: dict[str, Row] = {
    "d2v1_speech_base": ("spans", 0.65, 10, 0, False, 1),
    "d2v1_speech_audioset": ("spans", 0.65, 10, 0, False, 1),
    "d2v1_text_base": ("spans", 0.35, 4, 0, False, 1),
    "d2v2_speech_base": ("block1d", 0.5, 5, 0.05, False, 8),
    "d2v2_speech_large": ("block1d", 0.55, 5, 0.1, False, 12),
    "d2v2_text_base": ("random", 0.48, 1, 0, False, 8),
    "d2v2_text_large_a": ("random", 0.5, 1, 0, False, 8),
    "d2v2_text_large_b": ("random", 0.5, 1, 0, False, 8),
    "d2v2_vision_base": ("block2d", 0.8, 3, 0.07, True, 16),
    "d2v2_vision_large": ("block2d", 0.75, 3, 0.1, True, 16),
    "d2v2_vision_huge16": ("block2d", 0.75, 3, 0.1, True, 16),
    "d2v2_vision_huge14": ("block2d", 0.75, 3, 0.1, True, 16),
    "d2v2_audio_eat_base": ("block2d", 0.8, 5, 0.07, True, 16),
}
# Hidden dropout, attention dropout, drop path, layer drop, layer scale (0: none).
REGULARISATION: dict[str, Row] = {
    "d2v1_speech_base": (0.1, 0.1, 0, 0.05, 0),
    "d2v1_text_base": (0.1, 0.1, 0, 0, 0),
    "d2v1_vision_base": (0, 0.05, 0.25, 0, 1e-4),
    "d2v1_vision_large": (0, 0.15, 0.2, 0, 1e-5),
    "d2v1_vision_large_phase2": (0, 0.15, 0.2, 0, 1e-5),
    "d2v2_speech_base": (0.1, 0.1, 0, 0.05, 0),
    "d2v2_speech_large": (0.1, 0.1, 0, 0, 0),
    "d2v2_text_base": (0.1, 0.1, 0, 0, 0),
    "d2v2_text_large_a": (0.1, 0.1, 0, 0, 0),
    "d2v2_text_large_b": (0.1, 0.1, 0, 0, 0),
    "d2v2_vision_base": (0, 0, 0, 0, 0),
    "d2v2_vision_large": (0, 0, 0, 0, 0),
    "d2v2_vision_huge16": (0, 0, 0, 0, 0),
    "d2v2_vision_huge14": (0, 0, 0, 0, 0),
    "d2v2_audio_eat_base": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", OPTIMISATION)
def test_pretraining_is_as_published(name: str) -> None:
    recipe = load(name)
    optim = values(recipe, "optim", "lr schedule warmup_steps max_steps betas eps weight_decay clip")
    assert (recipe.global_batch_size, recipe.batch_unit, *optim) == OPTIMISATION[name]
    target = values(recipe, "objective", "target.top_k_layers target.layer_norm target.final_norm loss.beta")
    assert target + values(recipe, "objective.ema", "start end anneal_steps") == TARGETS[name]
    if name in MASKS:
        assert values(recipe, "objective.masking", "kind prob length adjust inverse clones") == MASKS[name]
    else:
        # 120 of 196 patches in blocks of at least 16.
        assert values(recipe, "objective.masking", "kind target_count min_block clones") == ("blockwise", 120, 16, 1)
    if name in REGULARISATION:
        keys = "dropout attention_dropout drop_path layer_drop layer_scale"
        assert values(recipe, "model.backbone", keys) == REGULARISATION[name]
    if "2_vision" in name:
        # 0.01, there of the mean over a GPU's rows (images x M), here of a row.
        images = 16 if name == "d2v2_vision_base" else 8
        assert recipe.objective.loss.cls_weight == pytest.approx(0.01 * images * 16)


def test_spectrograms_are_as_eat_publishes_them() -> None:
    """Kaldi's fbank of 128 bands, 10 s in 64 x 8 patches of 16 x 16; (x - mean) / (2 std); the CLS term weighs 1, there
    of the mean over a GPU's rows (12 clips x M)."""
    recipe = load("d2v2_audio_eat_base")
    [stem] = recipe.model.arrays.values()
    assert (stem.channels, stem.extents, stem.patch, stem.grid) == (1, (128, 1024), (16, 16), (8, 64))
    assert (stem.transform, stem.normalise, stem.mean, stem.std) == ("log_mel", "moments", [-4.268], [2 * 4.569])
    keys = "sample_rate hop length window low_hz highest_hz"
    assert tuple(getattr(stem.log_mel, key) for key in keys.split()) == (16_000, 160, 400, "hanning", 20, 8000)
    assert (stem.positions, stem.extra_tokens) == ("sincos", 1)
    assert recipe.objective.loss.cls_weight == 1 * 12 * 16
    decoder = values(recipe, "model.predictor", "kind width kernel groups layers")
    assert decoder == ("conv2d", 768, 3, 16, 6)
    assert values(recipe, "model.backbone", "width heads ffn depth prenet_depth norm_eps") == (
        768,
        12,
        3072,
        12,
        0,
        1e-6,
    )


# 7.1: updates, peak, batch in seconds, share and length of the time masks, channel masks, layer drop, frozen updates.
# None: the specification has no value of this model.
CTC: dict[str, Row] = {
    "base_10m": (13_000, 5e-5, 1600, 0.65, 10, 0.25, 0.1, 10_000),
    "base_1h": (13_000, 5e-5, 1600, 0.65, 10, 0.25, 0.1, 10_000),
    "base_10h": (20_000, 5e-5, 1600, 0.65, 10, 0.5, 0.05, 10_000),
    "base_100h": (80_000, 3e-5, 1600, 0.65, 10, 0.5, 0.1, 0),
    "base_960h": (320_000, 1e-4, 1600, 0.5, 10, 0.1, 0.1, 0),
    "large_10m": (13_000, 1e-4, 1600, 0.65, 10, 0.25, None, 10_000),
    "large_1h": (13_000, 3e-4, 1600, 0.75, 10, 0.25, None, 10_000),
    "large_10h": (20_000, 1e-4, 1600, 0.75, 10, 0.25, None, 10_000),
    "large_100h": (80_000, 3e-5, 1600, 0.5, 10, 0.5, None, 10_000),
    "large_960h": (320_000, 3e-5, 1920, 0.5, 10, 0.25, None, 10_000),
    "v2_10m": (10_000, 2e-6, None, 0.4, 3, 0.25, None, 100),
    "v2_1h": (60_000, 1e-5, None, 0.65, 5, None, None, 100),
    "v2_10h": (60_000, 2e-5, None, 0.5, 5, 0.1, None, 100),
    "v2_100h": (100_000, 1e-5, None, 0.4, 5, None, None, 100),
    "v2_960h": (200_000, 1e-5, 1280, 0.4, 5, None, None, 100),
}


@pytest.mark.parametrize("name", CTC)
def test_transcription_is_as_published(name: str) -> None:
    recipe = load(f"finetune_speech_{name}")
    found = (
        *values(recipe, "optim", "max_steps lr"),
        recipe.global_batch_size,
        *values(recipe, "task.ctc", "time_mask time_mask_length channel_mask"),
        *values(recipe, "task", "backbone.layer_drop freeze_updates"),
    )
    assert tuple(None if stated is None else one for one, stated in zip(found, CTC[name], strict=True)) == CTC[name]
    assert values(recipe, "optim", "eps weight_decay clip") == (1e-8, 0, 0)
    assert recipe.optim.betas == ((0.9, 0.95) if name == "v2_10m" else (0.9, 0.98))
    assert values(recipe, "task", "ctc.channel_mask_length backbone.dropout backbone.activation_dropout") == (
        64,
        0,
        0.1,
    )
    if name.startswith("v2"):
        assert recipe.optim.schedule == "cosine"
    else:
        assert recipe.optim.schedule == "tri_stage"
        assert list(recipe.optim.phase_ratio) == [0.1, 0.4, 0.5]
        assert recipe.optim.phase_scale[1] == 0.05


# 7.2: batch, peak, layer decay, warm-up, updates, weight decay, drop path, mixup, its share, betas, clip, last rate.
IMAGES: dict[str, Row] = {
    "v1_base": (1024, 4e-3, 0.65, 20 * 1251, 100 * 1251, 0, 0.2, 0.8, 1, (0.9, 0.999), 0, 1e-6),
    "v1_large": (1024, 4e-3, 0.65, 5 * 1251, 50 * 1251, 0.05, 0.25, 0.8, 1, (0.9, 0.999), 0, 1e-6),
    "v2_base": (512, 1e-3, 0.65, 16_000, 250_200, 0.05, 0.1, 0.7, 0.9, (0.9, 0.95), 0, 1e-6),
    "v2_large": (512, 5e-4, 0.75, 16_000, 125_200, 0.05, 0.2, 0.7, 0.9, (0.9, 0.95), 4, 1e-7),
    "v2_huge": (512, 5e-4, 0.75, 16_000, 125_200, 0.05, 0.2, 0.7, 0.9, (0.9, 0.95), 4, 1e-20),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_classification_is_as_published(name: str) -> None:
    recipe = load(f"finetune_vision_{name}")
    found = (
        recipe.global_batch_size,
        *values(recipe, "", "optim.lr task.layer_decay optim.warmup_steps optim.max_steps optim.weight_decay"),
        *values(recipe, "task", "backbone.drop_path image.mixup image.mix_probability"),
        *values(recipe, "optim", "betas clip min_lr"),
    )
    assert found == IMAGES[name]
    assert values(recipe, "task", "label_smoothing image.cutmix image.erase") == (0.1, 1, 0.25)
    assert values(recipe, "task.image", "rand_augment rand_augment_std") == (9, 0.5)


# 7.3: batch, updates, warm-up.
GLUE: dict[str, Row] = {
    "cola": (16, 5336, 320),
    "mnli": (32, 123_873, 7432),
    "mrpc": (16, 2296, 137),
    "qnli": (32, 33_112, 1986),
    "qqp": (32, 113_272, 28_318),
    "rte": (16, 2036, 122),
    "sst2": (32, 20_935, 1256),
    "stsb": (16, 3598, 214),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_is_as_published(name: str) -> None:
    recipe = load(f"finetune_glue_{name}")
    assert (recipe.global_batch_size, *values(recipe, "optim", "max_steps warmup_steps")) == GLUE[name]
    assert values(recipe, "optim", "schedule betas eps weight_decay clip") == ("polynomial", (0.9, 0.98), 1e-6, 0.1, 0)
    # In the sweeps of both versions.
    assert recipe.optim.lr in (1e-5, 2e-5, 4e-5)
