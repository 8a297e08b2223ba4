"""What is left out is not there: values that another computation gives, too."""

from dataclasses import replace

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from d2v_scale.batch import Layout
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.errors import UserError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.evaluation.occlusion import blocks_of, importance
from d2v_scale.recipe import Recipe


def encoder_of(name: str) -> FrozenEncoder:
    target = ObjectiveConfig(target=tiny_models.target_of(name))
    return FrozenEncoder.untrained(Recipe(model=tiny_models.model(name), objective=target))


def test_blocks_are_cubes_and_at_most_so_many() -> None:
    assert blocks_of((4, 4), 4).view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert blocks_of((5,), 3).tolist() == [0, 0, 1, 1, 2]
    for extents in ((100,), (14, 14), (3, 9, 7), (1,), (64,)):
        blocks = blocks_of(extents)
        assert len(blocks.unique()) == int(blocks.max()) + 1 <= 64
    assert blocks_of((64,)).tolist() == list(range(64))


@pytest.mark.parametrize("name", ["v2_vision", "v2_speech", "v2_text", "v2_maps", "v2_vision+0"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_part_that_is_left_out_is_not_there(name: str, padded: bool, world_of_one: None) -> None:
    """Without it the vector is another; of text, whatever stood at the hidden places changes nothing."""
    encoder = encoder_of(name)
    batch = tiny_models.batch(name, padded=padded)
    batch = replace(
        batch, masked_rt=torch.zeros_like(batch.masked_rt), layout=Layout.of(torch.zeros_like(batch.masked_rt))
    )
    found = importance(encoder, batch, most=5)
    valid = encoder.valid_positions(batch)
    real = torch.ones_like(found, dtype=torch.bool) if valid is None else valid
    assert found[~real].isnan().all()
    assert (found[real].nan_to_num(0) >= -1e-5).all()
    assert found[real].nan_to_num(0).max() > 1e-5
    if name == "v2_text":
        part = blocks_of(batch.extents, 5)
        inputs = batch.inputs.clone()
        inputs[:, part == 1] = torch.where(inputs[:, part == 1] == 1, 1, 7)
        masked = (part == 1).expand(len(inputs), -1)
        kept = [
            encoder.model.features_of_visible(replace(batch, inputs=one, masked_rt=masked, layout=Layout.of(masked)))
            for one in (batch.inputs, inputs)
        ]
        torch.testing.assert_close(kept[0], kept[1])
        if not padded:
            whole = encoder.hidden_states(batch)[-1].mean(dim=1)
            change = 1 - F.cosine_similarity(kept[0].mean(dim=1), whole)
            torch.testing.assert_close(found[:, part == 1][:, 0], change, atol=1e-5, rtol=1e-4)


def test_an_encoder_that_cannot_leave_out_is_refused(world_of_one: None) -> None:
    with pytest.raises(UserError, match=r"is a 1\.0 encoder: a hidden position leaves a mask embedding"):
        importance(encoder_of("v1_vision"), tiny_models.batch("v1_vision"))
