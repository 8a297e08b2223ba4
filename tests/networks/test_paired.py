"""Paired samples: parts that are one sequence, what is hidden of them, and what a sample does not have."""

import dataclasses

import pytest
import tiny_models
import torch
from torch import Tensor

from d2v_scale.batch import Batch, Layout
from d2v_scale.data.paired import joined
from d2v_scale.data2vec.comparison import compare
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.position_bias import block_diagonal, coded_positions, sincos_positions
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher

pytestmark = pytest.mark.usefixtures("world_of_one")
DRAW = Draw(seed=5, step=7)


def build(config: ModelConfig) -> tuple[Student, Teacher]:
    student, teacher = Student(config), Teacher(config, tiny_models.TAPS, published_parts(config))
    for stack in (student, teacher):
        initialize(stack, 1)
    with torch.no_grad():
        # Away from zero biases and vectors, so that every path shows.
        for name, parameter in student.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return student.eval(), teacher


def losses(student: Student, teacher: Teacher, batch: Batch) -> dict[str, Tensor]:
    """The loss of every part, by its stem."""
    out = student(batch, DRAW)
    made, found, place = teacher.make(batch, out.features_btd), {}, 0
    for part in batch.of_stems:
        targets = teacher.targets[part.modality]
        own = slice(place, place + len(targets))
        compared = compare(part, targets, out.predictions[own], made[own])
        found[part.modality] = torch.stack([one.loss_sum(LossConfig()) for one in compared]).sum()
        place += len(targets)
    return found


def pair(version: str, stems: tuple[str, ...], **changes: dict) -> Batch:
    """Three samples of these stems, `changes` in the parts of single ones."""
    clones = 2 if version == "v2" else 1
    parts = []
    for stem in stems:
        one = tiny_models.batch(f"{version}_{stem}", clones=clones, seed=len(stem))
        parts.append(dataclasses.replace(one, source=f"pairs/{stem}", **changes.get(stem, {})))
    return joined(tuple(parts), "+".join(stems), source="pairs")


def without(batch: Batch, present_b: Tensor) -> dict:
    """What changes in a part that only these samples have."""
    real_bt = present_b[:, None].expand(-1, batch.masked_rt.shape[1])
    present_r = present_b.repeat_interleave(batch.clones)
    masked_rt = batch.masked_rt if batch.layout.visible_rs is not None else batch.masked_rt & present_r[:, None]
    return {
        "present_b": present_b,
        "absent": int((~present_b).sum()),
        "real_bt": real_bt.contiguous(),
        "masked_rt": masked_rt,
        "layout": Layout.of(masked_rt, real_bt),
    }


NOBODY = torch.zeros(3, dtype=torch.bool)


@pytest.mark.parametrize("alone", ["vision", "speech", "text"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_pair_of_which_one_part_is_there_is_that_part_alone(version: str, alone: str) -> None:
    config = tiny_models.paired(version)
    student, teacher = build(config)
    own = tiny_models.batch(f"{version}_{alone}", clones=2 if version == "v2" else 1, seed=len(alone))
    expected = losses(student, teacher, own)[alone]
    others = {stem: without(tiny_models.batch(f"{version}_{stem}", clones=own.clones), NOBODY) for stem in config.stems}
    del others[alone]
    batch = pair(version, tuple(config.stems), **others)
    found = losses(student, teacher, batch)
    assert float(expected.detach()) > 0
    torch.testing.assert_close(found[alone], expected, rtol=1e-5, atol=0)
    assert all(float(found[stem].detach()) == 0 for stem in others)


def hiding(part: Batch, rows: list[int]) -> dict:
    """What changes in a part that is hidden in these rows."""
    hidden_r = torch.zeros(len(part.masked_rt), dtype=torch.bool)
    hidden_r[rows] = True
    layout = part.layout
    whole_rt = part.masked_rt | hidden_r[:, None]
    if layout.visible_rs is None:
        return {"hidden_r": hidden_r, "masked_rt": whole_rt, "layout": None}
    decoded_n = whole_rt.flatten().nonzero().squeeze(1)
    return {"hidden_r": hidden_r, "masked_rt": whole_rt, "layout": dataclasses.replace(layout, decoded_n=decoded_n)}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_hidden_part_is_predicted_whole_and_from_the_others_alone(version: str) -> None:
    student, _ = build(tiny_models.paired(version))
    stems = ("vision", "text")
    plain = pair(version, stems)
    changes = {"vision": hiding(plain.parts[0], [0])}

    def predictions(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        parts = {stem: dict(changes.get(stem, {})) for stem in stems}
        for stem, values in inputs.items():
            parts[stem]["inputs"] = values
            if stem == "text" and version == "v1":
                parts[stem]["student_inputs"] = values
        batch = pair(version, stems, **parts)
        own = batch.parts[0].layout.outputs_n < batch.parts[0].masked_rt.shape[1]
        assert int(own.sum()) == batch.parts[0].masked_rt.shape[1]
        with torch.no_grad():
            found = student(batch, DRAW).predictions[0]
        others = batch.parts[0].layout.outputs_n >= batch.parts[0].clones * batch.parts[0].masked_rt.shape[1]
        return found[own], found[others]

    texts = plain.parts[1].inputs
    first, rest = predictions(text=texts)
    images = plain.parts[0].inputs + torch.tensor([1.0, 0, 0])[:, None, None, None]
    assert torch.equal(predictions(vision=images, text=texts)[0], first), "it was not hidden"
    texts = texts.clone()
    texts[0] = texts[0].flip(0)
    assert not torch.allclose(predictions(text=texts)[0], first, atol=1e-4), "nothing of the other part gets there"
    torch.testing.assert_close(predictions(text=texts)[1], rest, rtol=0, atol=0)
    # Where to, the states say: otherwise all positions of a hidden part would be predicted alike.
    assert float(first.std(dim=0).mean()) > 1e-3


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_parameter_of_a_pair_gets_a_gradient_and_order_is_told(version: str) -> None:
    student, teacher = build(tiny_models.paired(version))
    stems = ("vision", "speech", "text")
    plain = pair(version, stems)
    batch = pair(version, stems, **{part.modality: hiding(part, [k]) for k, part in enumerate(plain.parts)})
    sum(losses(student, teacher, batch).values()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    hidden = [name for name, _ in teacher.named_parameters() if ".hidden." in name]
    assert not hidden, "nothing is hidden from a teacher"


def test_what_a_sample_does_not_have_changes_nothing() -> None:
    student, teacher = build(tiny_models.paired("v2"))
    stems = ("vision", "speech")
    plain = pair("v2", stems)
    some = without(plain.parts[1], torch.tensor([True, False, True]))
    found = losses(student, teacher, pair("v2", stems, speech=some))
    other = plain.parts[1].inputs.clone()
    other[1] = 9.0
    again = losses(student, teacher, pair("v2", stems, speech=some | {"inputs": other}))
    assert all(torch.equal(found[stem], again[stem]) for stem in stems)
    states_btd = teacher.features(plain, student.stem_features(plain), [-1])[0]
    assert states_btd.shape[1] == plain.masked_rt.shape[1]


def test_biases_of_parts_say_nothing_between_them() -> None:
    first, second = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 2, 2)
    whole = block_diagonal([first, None, second], [3, 1, 2])
    assert whole is not None
    assert whole.shape == (4, 2, 6, 6)
    assert torch.equal(whole[2, :, :3, :3], first[0])
    assert torch.equal(whole[:, :, 4:, 4:], second)
    assert float(whole.abs().sum()) == pytest.approx(4 * float(first.abs().sum()) + float(second.abs().sum()), rel=1e-5)


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 2)])
def test_codes_of_positions_are_the_same_wherever_they_are_made(grid: tuple[int, ...]) -> None:
    torch.testing.assert_close(
        coded_positions(30, grid, torch.device("cpu")), sincos_positions(30, grid), rtol=0, atol=1e-5
    )
