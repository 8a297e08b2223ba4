"""Views of held-out samples: what the student makes of each sample under each mask, in the samples' order."""

from collections.abc import Iterator

import pytest
import tiny_models
import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.evaluation.views import VIEWS, ViewProbe
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student
from d2v_scale.parallel import groups


@pytest.fixture(params=["v1_vision", "v2_vision", "v1_speech", "v2_text"])
def name(request: pytest.FixtureRequest, world_of_one: None) -> str:
    return str(request.param)


def student_of(name: str) -> Student:
    student = Student(tiny_models.model(name))
    initialize(student, 0)
    return student.eval()


def readings_of(name: str, clones: int) -> Iterator[list[Batch]]:
    for seed in range(VIEWS // clones):
        yield [
            tiny_models.batch(name, samples=size, clones=clones, padded="vision" not in name, seed=10 * seed + size)
            for size in (3, 2)
        ]


@torch.no_grad()
def test_every_view_of_every_sample_is_in_its_place_and_hooks_are_gone(name: str) -> None:
    student, clones = student_of(name), 2 if name.startswith("v2") else 1
    probe = ViewProbe(student, groups.single_process())
    found, wanted = [], torch.zeros(5, VIEWS, student.config.backbone.width)
    for number, reading in enumerate(readings_of(name, clones)):
        with probe.watching(reading) as seen:
            for batch in reading:
                student(batch, Draw(0, 0))
        found.append(list(zip((0, 3), seen, strict=True)))
        for first, batch in zip((0, 3), reading, strict=True):
            for row, pooled in enumerate(by_hand(student, batch)):
                wanted[first + row // clones, number * clones + row % clones] = pooled
    torch.testing.assert_close(probe.together(found, 5), wanted)
    assert not student.blocks[-1]._forward_hooks


def by_hand(student: Student, batch: Batch) -> Iterator[Tensor]:
    """Row by row: the mean of the last block's output over the positions that are neither hidden nor padding."""
    carry, _ = student.enter(batch)
    student.run_blocks(batch, carry, Draw(0, 0))
    states_rsd = carry.states_rsd[:, carry.extra_tokens :]
    valid_bt = student.valid_positions(batch)
    for row, states_sd in enumerate(states_rsd):
        seen_t = ~batch.masked_rt[row]
        real_t = torch.ones_like(seen_t) if valid_bt is None else valid_bt[row // batch.clones]
        chosen = real_t[seen_t] if student.config.visible_only else seen_t & real_t
        yield states_sd[chosen].mean(dim=0)


def test_more_clones_than_views_are_left_out(world_of_one: None) -> None:
    student = student_of("v2_vision")
    probe = ViewProbe(student, groups.single_process())
    width = student.config.backbone.width
    pooled = torch.arange(3.0 * 6 * width).view(3, 6, width)
    assert torch.equal(probe.together([[(0, pooled)]], 3), pooled[:, :VIEWS])
