"""d2v_scale.evaluation.layer_probe against the same figures computed the slow way."""

import math

import pytest
import tiny_models
import torch

from d2v_scale.data2vec.statistics import linear_cka
from d2v_scale.evaluation.layer_probe import LayerProbe, attention_entropy
from d2v_scale.model.init import initialize
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel import groups

SEED = 3


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_every_layer_of_every_model_has_an_entropy_and_a_likeness(name: str) -> None:
    topology = groups.single_process()
    config = tiny_models.model(name)
    student, teacher = Student(config), Teacher(config, tiny_models.target_of(name), TeacherParts())
    initialize(student, SEED)
    initialize(teacher, SEED)
    probe = LayerProbe(student, teacher, topology)
    batch = tiny_models.batch(name, samples=5, clones=2 if name.startswith("v2") else 1, padded=True)
    with torch.no_grad(), probe.watching(batch):
        student(batch, Draw(SEED, 0))
        teacher(batch)
    figures = {key: float(value) for key, value in probe.figures().items()}
    depth = config.backbone.depth
    for kind in ("attention_entropy", "cka"):
        layers = [figures[f"{kind}/layer_{index + 1:02d}"] for index in range(depth)]
        assert all(0 < value < 1 for value in layers), figures
        assert figures[kind] == pytest.approx(sum(layers) / depth, rel=1e-5)
    # What follows is not looked at, and nothing stays in the modules.
    student(batch, Draw(SEED, 1))
    assert float(probe.figures()["cka"]) == figures["cka"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    with probe.watching(None):
        student(batch, Draw(SEED, 0))
    assert float(probe.figures()["cka"]) == 0.0


@pytest.mark.parametrize("depth", [2, 5])
def test_layers_that_one_of_both_networks_lacks_are_not_alike_nor_unlike(depth: int) -> None:
    """The student's layers beyond a shallower teacher's were recorded with a likeness of 0."""
    topology = groups.single_process()
    config, own = tiny_models.model("v2_vision", depth=3), tiny_models.model("v2_vision", depth=depth)
    student, teacher = Student(config), Teacher(own, tiny_models.target_of("v2_vision"), TeacherParts())
    initialize(student, SEED)
    initialize(teacher, SEED)
    batch = tiny_models.batch("v2_vision", samples=5, clones=2)
    probe = LayerProbe(student, teacher, topology)
    with torch.no_grad(), probe.watching(batch):
        student(batch, Draw(SEED, 0))
        teacher(batch)
    figures = {key: float(value) for key, value in probe.figures().items()}
    layers = {key: value for key, value in figures.items() if key.startswith("cka/")}
    assert list(layers) == [f"cka/layer_{number:02d}" for number in range(1, min(depth, 3) + 1)]
    assert figures["cka"] == pytest.approx(sum(layers.values()) / len(layers))
    assert "attention_entropy/layer_03" in figures


def test_networks_that_see_and_compute_the_same_are_alike() -> None:
    name = "v1_vision"
    config = tiny_models.model(name)
    student, teacher = Student(config), Teacher(config, tiny_models.target_of(name), TeacherParts())
    initialize(student, SEED)
    initialize(teacher, SEED)
    batch = tiny_models.batch(name)
    batch.masked_rt.zero_()
    probe = LayerProbe(student, teacher, groups.single_process())
    with torch.no_grad(), probe.watching(batch):
        student(batch, Draw(SEED, 0))
        teacher(batch)
    assert float(probe.figures()["cka"]) == pytest.approx(1.0, abs=1e-4)


def test_padding_is_not_compared() -> None:
    name = "v1_text"
    config = tiny_models.model(name)
    student, teacher = Student(config), Teacher(config, tiny_models.target_of(name), TeacherParts())
    initialize(student, SEED)
    initialize(teacher, SEED + 1)
    batch = tiny_models.batch(name, samples=4, padded=True)
    valid_bt = student.valid_positions(batch)
    assert valid_bt is not None
    assert not valid_bt.all()
    states: list[torch.Tensor] = []
    for block in (student.blocks[1], teacher.blocks[1]):
        block.register_forward_hook(lambda _m, _i, output: states.append(output[0].detach()))
    probe = LayerProbe(student, teacher, groups.single_process())
    with torch.no_grad(), probe.watching(batch):
        student(batch, Draw(SEED, 0))
        teacher(batch)
    expected = linear_cka(states[0][valid_bt], states[1][valid_bt])
    assert float(probe.figures()["cka/layer_02"]) == pytest.approx(float(expected), rel=1e-4)


class _Heads:
    heads, head_dim, split_bias = 2, 4, False


def test_entropy_is_1_when_all_keys_in_reach_are_attended_alike() -> None:
    qkv = torch.zeros(3, 16, 2 * 3 * 4)
    assert float(attention_entropy(_Heads(), qkv, None)) == pytest.approx(1.0)
    valid = torch.zeros(3, 1, 1, 16, dtype=torch.bool)
    valid[..., :4] = True
    assert float(attention_entropy(_Heads(), qkv, valid)) == pytest.approx(1.0)
    # Two of the four keys hold all of the attention.
    towards = torch.zeros(1, 2, 16, 16)
    towards[..., :2] = 50.0
    assert float(attention_entropy(_Heads(), qkv, towards.masked_fill(~valid[:1], -math.inf))) == pytest.approx(0.5)


def test_padded_queries_have_no_part_in_the_entropy() -> None:
    qkv = torch.zeros(3, 16, 2 * 3 * 4)
    sharp = torch.zeros(1, 2, 16, 16)
    sharp[:, :, 8:, 0] = 100.0
    weight = (torch.arange(15) < 7).float().expand(3, 15)  # beside one extra token
    assert float(attention_entropy(_Heads(), qkv, sharp, weight)) == pytest.approx(1.0)
    assert float(attention_entropy(_Heads(), qkv, sharp)) == pytest.approx(0.5)


def test_one_clone_of_each_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(attention: object, qkv_rsd: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(qkv_rsd)
        return torch.zeros(())

    monkeypatch.setattr("d2v_scale.evaluation.layer_probe.attention_entropy", spy)
    config = tiny_models.model("v2_vision")
    student, teacher = Student(config), Teacher(config, tiny_models.target_of("v2_vision"), TeacherParts())
    initialize(student, SEED)
    initialize(teacher, SEED)
    batch = tiny_models.batch("v2_vision", samples=5, clones=3)
    outputs: list[torch.Tensor] = []
    with torch.no_grad(), LayerProbe(student, teacher, groups.single_process()).watching(batch):
        student.blocks[0].attention.qkv.register_forward_hook(lambda _m, _i, output: outputs.append(output[0]))
        student(batch, Draw(SEED, 0))
        teacher(batch)
    assert torch.equal(seen[0], outputs[0][::3])
