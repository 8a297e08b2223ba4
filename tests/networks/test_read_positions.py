"""Training computes less than everything, and reads the same."""

import pytest
import tiny_models
import torch

from d2v_scale.batch import Batch
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig, TargetConfig
from d2v_scale.data2vec.targets import Place, State, Target, build
from d2v_scale.data2vec.targets.average import AverageTopK
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher

pytestmark = pytest.mark.usefixtures("world_of_one")
DRAW = Draw(seed=5, step=7)
BY_POSITION = TargetConfig(top_k_layers=2, layer_norm="layer", final_norm="layer")


def stacks(config: ModelConfig, target: TargetConfig) -> tuple[Student, Teacher]:
    student, teacher = Student(config), Teacher(config, target, published_parts(config))
    for stack in (student, teacher):
        initialize(stack, 1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in [*student.parameters(), *teacher.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return student, teacher


@pytest.mark.parametrize("tap", ["ffn", "block"])
@pytest.mark.parametrize("layer_drop", [0.0, 1.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["v1_vision", "v1_speech", "v1_text", "v1_series", "v1_vision+2"])
def test_what_is_read_is_the_same_where_nothing_else_is_computed(
    name: str, padded: bool, layer_drop: float, tap: str
) -> None:
    config = tiny_models.model(name, drop_path=0.3, layer_drop=layer_drop)
    student, teacher = stacks(config, TargetConfig(top_k_layers=2, layer_norm="layer", final_norm="layer", tap=tap))
    batch = tiny_models.batch(name, padded=padded)
    read_n = batch.layout.masked_n
    assert 0 < len(read_n) < batch.masked_rt.numel()
    of_teacher = teacher.read(batch)
    assert of_teacher is not None
    assert torch.equal(of_teacher, read_n)
    found = []
    for only_read in (False, True):
        student.zero_grad()
        out = student(batch, DRAW, only_read=only_read)
        [made] = teacher.make(batch, out.features_btd, only_read=only_read)
        targets_nd = made.targets_btd.flatten(0, 1)[read_n]
        loss.masked_loss_sum(out.predictions_nd, targets_nd, LossConfig(), 32).backward()
        # A bias of attention has none where every block is dropped.
        gradients = {k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}
        found.append((out.predictions_nd, targets_nd, gradients))
    (predictions_nd, targets_nd, plain), (its_predictions_nd, its_targets_nd, gradients) = found
    torch.testing.assert_close(its_predictions_nd, predictions_nd)
    torch.testing.assert_close(its_targets_nd, targets_nd)
    assert out.encoder_rsd.shape == (3, 0, 32)
    # Whoever looks elsewhere finds no number.
    unread_bt = made.targets_btd.isnan().all(-1)
    assert torch.equal(unread_bt, ~batch.masked_rt)
    for key, gradient in gradients.items():
        scale = plain[key].abs().max()
        torch.testing.assert_close(gradient, plain[key], rtol=1e-4, atol=float(1e-5 * scale), msg=key)


@pytest.mark.parametrize("name", ["v2_speech", "v2_vision", "v2_text"])
def test_a_decoder_reads_every_state(name: str) -> None:
    student, teacher = stacks(tiny_models.model(name), BY_POSITION)
    batch = tiny_models.batch(name, clones=2)
    assert student.read(batch) is None
    assert teacher.read(batch) is None
    assert torch.equal(student(batch, DRAW, only_read=True).encoder_rsd, student(batch, DRAW).encoder_rsd)


def test_clones_of_a_sample_mask_what_others_do_not() -> None:
    student, teacher = stacks(tiny_models.model("v1_vision"), BY_POSITION)
    batch = tiny_models.batch("v1_vision", clones=2)
    assert teacher.read(batch) is None
    out, less = student(batch, DRAW), student(batch, DRAW, only_read=True)
    torch.testing.assert_close(less.predictions_nd, out.predictions_nd)


class Shifted(AverageTopK):
    def raw(self, running_btd: torch.Tensor | None, inputs_btd: torch.Tensor | None) -> torch.Tensor:
        return super().raw(running_btd, inputs_btd).roll(1, dims=1)


class Remembering(Target):
    def initial_state(self) -> State:
        return {"mean": torch.zeros(self.width)}


@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        (AverageTopK, ("instance", "none")),
        (AverageTopK, ("layer", "instance")),
        (AverageTopK, ("layer+batch", "layer")),
        (Shifted, ("layer", "layer")),
        (Remembering, ("layer", "layer")),
    ],
)
def test_targets_that_look_at_other_positions_get_all_of_them(kind: type[Target], norms: tuple[str, str]) -> None:
    config = TargetConfig(top_k_layers=2, layer_norm=norms[0], final_norm=norms[1])
    assert not kind(config, Place(depth=3, width=8, input_width=None)).is_by_position


@pytest.mark.parametrize("kind", ["average_top_k", "last_layer"])
@pytest.mark.parametrize("norms", [("layer", "layer"), ("none", "layer"), ("layer", "none")])
def test_targets_of_single_positions_are_known(kind: str, norms: tuple[str, str]) -> None:
    config = TargetConfig(kind=kind, top_k_layers=2, layer_norm=norms[0], final_norm=norms[1])
    assert build(config, Place(depth=3, width=8, input_width=None)).is_by_position


def test_one_target_over_all_positions_keeps_the_teacher_whole() -> None:
    config = tiny_models.model("v1_text")
    both = {"text": [BY_POSITION, TargetConfig(top_k_layers=2, layer_norm="instance")]}
    teacher = Teacher(config, both, published_parts(config))
    batch: Batch = tiny_models.batch("v1_text")
    assert teacher.read(batch) is None
