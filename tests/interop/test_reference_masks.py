"""Masks and decoders that the reference has no words for are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models

from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig
from d2v_scale.data2vec.own import OwnMasking, OwnObjective
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.reference_export import export_reference, fairseq_settings
from d2v_scale.modalities import published_parts
from d2v_scale.recipe import Recipe


@pytest.mark.parametrize("own", [False, True])
def test_blocks_are_refused_before_anything_is_written(tmp_path: Path, own: bool) -> None:
    blocks = ObjectiveConfig(masking=MaskingConfig(kind="blocks", size=2))
    if own:
        blocks = ObjectiveConfig(vision=OwnObjective(masking=OwnMasking(kind="blocks", size=2)))
    recipe = Recipe(model=tiny_models.model("v2_vision"), objective=blocks)
    nothing: Any = None
    with pytest.raises(CheckpointError, match="masks of kind 'blocks' have no name"):
        export_reference(nothing, recipe, "vision", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_decoder_along_the_line_of_an_images_patches_is_refused() -> None:
    """It was exported as the reference's planar one, whose kernels have another shape."""
    model = tiny_models.model("v2_vision")
    objective = ObjectiveConfig(target=tiny_models.target_of("v2_vision"))
    model.predictor.kind = "conv"
    assert fairseq_settings(model, objective, published_parts(model), "vision")["_name"] == "data2vec_multi"
    model.predictor.kind = "conv1d"
    with pytest.raises(CheckpointError, match="decoder of vision has 2 dimensions; this one has 1"):
        fairseq_settings(model, objective, published_parts(model), "vision")
