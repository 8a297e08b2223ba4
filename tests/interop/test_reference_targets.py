"""Targets that the reference has a word for, and those that it has none for."""

from typing import Any

import pytest
import tiny_models

from d2v_scale.data2vec.config import ObjectiveConfig, TargetConfig
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.reference_export import fairseq_settings
from d2v_scale.interop.reference_vision import data2vec_vision_settings
from d2v_scale.modalities import published_parts


def settings_of(name: str, **target: Any) -> dict[str, Any]:
    """What of the targets a 1.0 vision export says in its loop's arguments, others in the model's."""
    model, objective = tiny_models.model(name), ObjectiveConfig(target=TargetConfig(**target))
    if name == "v1_vision":
        return data2vec_vision_settings(model, objective)[1]
    return fairseq_settings(model, objective, published_parts(model), tiny_models.modality_of(name))


@pytest.mark.parametrize("kind", ["whitened", "codes", "input", "a_package.a_module:Target"])
@pytest.mark.parametrize("name", ["v1_vision", "v1_speech", "v1_text", "v2_vision"])
def test_a_kind_that_the_reference_cannot_say_is_refused_by_name(name: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"targets of kind '{kind}' have no name"):
        settings_of(name, kind=kind, top_k_layers=2)


def test_vision_says_any_layers_and_fairseq_the_last_ones_only() -> None:
    block = {"tap": "block", "layer_norm": "layer"}
    assert settings_of("v1_vision", layers=[2, 0], **block)["target_layers"] == [0, 2]
    assert settings_of("v1_vision", kind="last_layer", **block)["target_layers"] == [2]
    assert settings_of("v1_text", layers=[1, 2])["average_top_k_layers"] == 2
    with pytest.raises(CheckpointError, match=r"blocks \[0, 2\]"):
        settings_of("v2_vision", layers=[0, 2])
