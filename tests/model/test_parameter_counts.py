"""Published sizes, built on the meta device, have exactly the published numbers of parameters (spec 3.8)."""

import pytest
import torch

from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import SpeechStem, TextStem, VisionStem
from d2v_scale.networks.stack import Student

SIZES = {
    "base": {"width": 768, "heads": 12, "ffn": 3072, "depth": 12},
    "large": {"width": 1024, "heads": 16, "ffn": 4096, "depth": 24},
    "huge": {"width": 1280, "heads": 16, "ffn": 5120, "depth": 32},
}
BEIT = {"norm_first": True, "key_bias": False, "layer_scale": 1e-4, "final_norm": True}


def backbone(size: str, **changes: object) -> Backbone:
    return Backbone(**{**SIZES[size], **changes})  # type: ignore[arg-type]


def v2_vision(size: str, decoder: Predictor, patch_size: int = 16, **changes: object) -> ModelConfig:
    stem = VisionStem(positions="sincos", patch_size=patch_size)
    return ModelConfig(visible_only=True, vision=stem, backbone=backbone(size, **changes), predictor=decoder)


def v2_speech(size: str, width: int, **changes: object) -> ModelConfig:
    decoder = Predictor(kind="conv1d", width=width)
    return ModelConfig(
        visible_only=True, speech=SpeechStem(alibi=True), backbone=backbone(size, **changes), predictor=decoder
    )


def v2_text(size: str) -> ModelConfig:
    decoder = Predictor(kind="conv1d", width=768, kernel=9, groups=1, layers=5, residual=False, proj_layers=2)
    return ModelConfig(visible_only=True, text=TextStem(), backbone=backbone(size), predictor=decoder)


BASE_PLANAR = Predictor(kind="conv2d", width=768, kernel=3, layers=6)
LARGE_PLANAR = Predictor(kind="conv2d", width=1024, kernel=5, layers=3)
MLP = Predictor(kind="mlp")

PUBLISHED = {
    "v1_speech_base": (ModelConfig(speech=SpeechStem(), backbone=backbone("base")), 93_164_288, 590_592),
    "v1_speech_large": (ModelConfig(speech=SpeechStem(), backbone=backbone("large")), 313_276_416, 1_049_600),
    "v1_text_base": (ModelConfig(text=TextStem(), backbone=backbone("base"), predictor=MLP), 124_054_272, 2_361_600),
    "v1_vision_base": (ModelConfig(vision=VisionStem(), backbone=backbone("base", **BEIT)), 85_666_128, 590_592),
    "v1_vision_large": (ModelConfig(vision=VisionStem(), backbone=backbone("large", **BEIT)), 303_137_216, 1_049_600),
    "v2_speech_base": (v2_speech("base", 384), 93_163_532, 619_776),
    "v2_speech_large": (v2_speech("large", 768, depth=16, prenet_depth=8), 313_275_408, 1_908_736),
    "v2_vision_base": (v2_vision("base", BASE_PLANAR, depth=10, prenet_depth=2), 85_647_360, 2_585_856),
    "v2_vision_large": (v2_vision("large", LARGE_PLANAR), 303_099_904, 5_967_872),
    "v2_vision_huge16": (v2_vision("huge", LARGE_PLANAR), 630_666_240, 6_639_872),
    "v2_vision_huge14": (v2_vision("huge", LARGE_PLANAR, patch_size=14), 630_435_840, 6_639_872),
    "v2_text_base": (v2_text("base"), 124_054_272, 28_907_520),
    "v2_text_large": (v2_text("large"), 354_309_120, 31_070_464),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name: str, world_of_one: None) -> None:
    config, encoder, predictor = PUBLISHED[name]
    with torch.device("meta"):
        student = Student(config)
    assert all(parameter.is_meta for parameter in student.parameters())
    counts = {"encoder": 0, "predictor": 0}
    for key, parameter in student.named_parameters():
        counts["predictor" if key.startswith("predictors.") else "encoder"] += parameter.numel()
    assert counts == {"encoder": encoder, "predictor": predictor}
