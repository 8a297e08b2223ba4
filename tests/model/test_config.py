"""Sizes that do not fit together are named before anything is built."""

import itertools

import pytest
import tiny_models

from d2v_scale.errors import ConfigError
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import Backbone, ModelConfig
from d2v_scale.model.teacher_parts import TeacherParts


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_legal_models_pass(name: str) -> None:
    tiny_models.model(name).check()


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("v1_vision", "backbone.heads", 5),
        ("v1_vision", "backbone.dropout", 1.0),
        ("v1_vision", "vision.patch_size", 5),
        ("v1_speech", "speech.pos_conv_groups", 5),
        ("v1_speech", "speech.conv_layers", []),
        ("v1_text", "text.mask_id", 40),
        ("v2_speech", "predictor.groups", 5),
        ("v2_text", "predictor.proj_layers", 3),
        ("v1_speech", "backbone.layer_scale", 0.1),
    ],
)
def test_the_error_names_the_key(name: str, path: str, value: object) -> None:
    config = tiny_models.model(name)
    part, key = path.split(".")
    setattr(getattr(config, part), key, value)
    with pytest.raises(ConfigError) as error:
        config.check()
    assert error.value.key == f"model.{path}"


def test_special_tokens_must_differ() -> None:
    config = tiny_models.model("v1_text")
    assert config.text is not None
    config.text.eos_id = config.text.bos_id
    with pytest.raises(ConfigError, match="same id"):
        config.check()


@pytest.mark.parametrize(
    ("name", "parameter", "role"),
    [
        ("v1_speech", "stems.speech.features.convs.0.weight", "absent"),
        ("v1_speech", "stems.speech.context.mask_embedding", "absent"),
        ("v1_speech", "stems.speech.context.pos_convs.0.weight", "copied"),
        ("v1_speech", "stems.speech.context.norm.weight", "averaged"),
        ("v1_text", "stems.text.features.tokens.weight", "copied"),
        ("v1_vision", "predictors.vision.proj.weight", "averaged"),
        ("v1_vision", "final_norm.weight", "averaged"),
        ("v2_speech", "stems.speech.context.pos_convs.0.weight", "averaged"),
        ("v2_speech", "stems.speech.bias.scale", "averaged"),
        ("v2_vision", "predictors.vision.proj.weight", "absent"),
        ("v2_vision", "stems.vision.features.patch.weight", "averaged"),
        ("v2_text", "stems.text.features.tokens.weight", "absent"),
    ],
)
def test_published_roles(name: str, parameter: str, role: str) -> None:
    assert published_parts(tiny_models.model(name)).role(parameter) == role


def test_a_prefix_ends_at_a_dot() -> None:
    parts = TeacherParts(shared=["blocks.1"])
    assert parts.role("blocks.1.norm1.weight") == "absent"
    assert parts.role("blocks.10.norm1.weight") == "averaged"
    assert ModelConfig().modalities == []


def test_drop_path_with_a_prenet_grows_as_in_the_reference() -> None:
    """Spec 7.2, ViT-B of 2.0 at 0.1: linear over the 10 main blocks, of which the 2 of the prenet take the first."""
    rates = Backbone(depth=10, prenet_depth=2, drop_path=0.1).drop_path_rates()
    assert rates[:3] == pytest.approx([0, 1 / 90, 2 / 90])
    assert len(rates) == 12
    steps = [after - before for before, after in itertools.pairwise(rates[2:])]
    assert steps == pytest.approx([(0.1 - 2 / 90) / 9] * 9)
    assert Backbone(depth=3, drop_path=0.2).drop_path_rates() == pytest.approx([0, 0.1, 0.2])
