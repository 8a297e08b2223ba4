"""The student's mean states, which KoLeo keeps apart."""

import pytest
import tiny_models
import torch

from d2v_scale.batch import Batch
from d2v_scale.networks.stack import Student

pytestmark = pytest.mark.usefixtures("world_of_one")


def kept(student: Student, batch: Batch) -> int:
    """Positions of the encoder's output."""
    return int((~batch.masked_rt[0]).sum()) if student.config.visible_only else batch.masked_rt.shape[1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["v1_text", "v2_speech", "v2_vision"])
def test_they_are_of_what_the_encoder_was_given_but_padding(name: str, padded: bool) -> None:
    student = Student(tiny_models.model(name))
    batch = tiny_models.batch(name, clones=1 if name == "v1_text" else 2, padded=padded)
    encoder_rsd = torch.randn(len(batch.masked_rt), kept(student, batch), student.config.backbone.width)
    (means_rd,) = student.mean_states(batch, encoder_rsd)
    valid_bt = student.valid_positions(batch)
    assert (valid_bt is not None) is (padded and name != "v2_vision")
    for row, states_sd in enumerate(encoder_rsd):
        seen_t = ~batch.masked_rt[row] if student.config.visible_only else torch.ones_like(batch.masked_rt[row])
        real_t = seen_t if valid_bt is None else valid_bt[row // batch.clones]
        torch.testing.assert_close(means_rd[row], states_sd[real_t[seen_t]].mean(dim=0))


@pytest.mark.parametrize("padded", [False, True])
def test_samples_that_differ_by_less_than_a_digit_of_bf16_are_apart(padded: bool) -> None:
    """Means were rounded to the precision of the states: such samples had a distance of 0, and nothing drew them
    apart."""
    student = Student(tiny_models.model("v2_speech"))
    batch = tiny_models.batch("v2_speech", clones=1, padded=padded)
    encoder_rsd = torch.ones(len(batch.masked_rt), kept(student, batch), student.config.backbone.width)
    encoder_rsd[0, 0] += 2.0**-7
    (means_rd,) = student.mean_states(batch, encoder_rsd.bfloat16())
    assert means_rd.dtype == torch.float32
    assert bool((means_rd[0] > means_rd[1]).all())
